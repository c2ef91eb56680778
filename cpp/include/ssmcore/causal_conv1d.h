// The causal depthwise convolution that precedes the scan in a Mamba block.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/gradient.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

inline constexpr int64_t kMinConvWidth = 2;
inline constexpr int64_t kMaxConvWidth = 8;

enum class Activation : uint8_t { none, silu };

// out(t) = act(bias[d] + Σ_w weight[d, w] x(t - width + 1 + w)), where x before the start comes
// from initial_state, or is 0.
//
// Or everything is float64, for checking on the CPU.
struct CausalConv1dFwdArgs {
  TensorView x;       // (batch, dim, seqlen): float32, bfloat16 or float16
  TensorView weight;  // (dim, width), width 2 to 8, x's dtype or float32
  TensorView bias;    // optional (dim), x's dtype or float32
  Activation activation = Activation::none;

  // The state is (slots, dim, state_len), oldest first, in x's dtype, state_len ≥ width - 1.
  // Without state_indices slots = batch. The two may be the same memory.
  TensorView initial_state;  // optional: the inputs before x; the last width - 1 are used
  TensorView final_state;    // optional, written: the last state_len of (initial_state, x)
  TensorView state_indices;  // optional (batch), int32, as in SelectiveScanFwdArgs

  // Several sequences in a row, either packed as in SelectiveScanFwdArgs, with states,
  TensorView cu_seqlens;  // optional (sequences + 1), int32
  // or numbered step by step, without states: a step sees those before it of the same number, and
  // one with a negative number gives 0.
  TensorView seq_idx;  // optional (batch, seqlen), int32

  TensorView out;  // (batch, dim, seqlen), x's dtype, written; overlaps no input
};

size_t causal_conv1d_fwd_workspace_size(const CausalConv1dFwdArgs& args, const Context& context);

void causal_conv1d_fwd(const CausalConv1dFwdArgs& args, const Exec& exec);

// The gradients of a loss with respect to what causal_conv1d_fwd read, from those with respect to
// what it wrote.
struct CausalConv1dBwdArgs {
  // As the forward had them.
  TensorView x, weight, bias;
  Activation activation = Activation::none;
  TensorView initial_state;
  TensorView state_indices;  // of initial_state, dfinal_state and dinitial_state
  TensorView cu_seqlens, seq_idx;

  TensorView dout;          // (batch, dim, seqlen), x's dtype
  TensorView dfinal_state;  // optional (slots, dim, state_len), x's dtype

  // Each is optional, in its input's dtype or float32, and overlaps no input and no other gradient.
  // dbias only with bias; dinitial_state also where the forward started from zeros. Slots that
  // state_indices does not name are left as they are.
  Gradient dx;              // (batch, dim, seqlen)
  Gradient dweight;         // (dim, width)
  Gradient dbias;           // (dim)
  Gradient dinitial_state;  // (slots, dim, state_len)
};

size_t causal_conv1d_bwd_workspace_size(const CausalConv1dBwdArgs& args, const Context& context);

void causal_conv1d_bwd(const CausalConv1dBwdArgs& args, const Exec& exec);

// causal_conv1d_fwd for the next few tokens of a running sequence, updating `conv_state` in place:
// shifted, oldest first, or, with cache_seqlens, written round and round.
struct CausalConv1dUpdateArgs {
  TensorView x;              // (batch, dim) or (batch, dim, tokens)
  TensorView conv_state;     // (slots, dim, state_len), updated
  TensorView cache_seqlens;  // optional (batch), int32, ≥ 0: tokens row b has seen; input number i
                             // is then at i modulo state_len
  TensorView weight;         // (dim, width)
  TensorView bias;           // optional (dim)
  Activation activation = Activation::none;
  TensorView state_indices;  // optional (batch), int32
  TensorView out;            // x's shape, written
};

size_t causal_conv1d_update_workspace_size(const CausalConv1dUpdateArgs& args,
                                           const Context& context);

void causal_conv1d_update(const CausalConv1dUpdateArgs& args, const Exec& exec);

}  // namespace ssmcore
