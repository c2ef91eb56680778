// The Mamba block (Gu & Dao, arXiv 2312.00752, figure 3) as a whole.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/tensor.h"
#include "ssmcore/weight.h"

namespace ssmcore {

struct MambaBlockWeights {
  Weight in_proj;             // (2 dim, d_model): x, then z
  TensorView in_proj_bias;    // optional (2 dim)
  TensorView conv_weight;     // (dim, width), float32 or the activation type
  TensorView conv_bias;       // optional (dim)
  Weight x_proj;              // (dt_rank + 2 dstate, dim): Δ, B, C
  Weight dt_proj;             // (dim, dt_rank)
  TensorView dt_bias;         // optional (dim), float32
  TensorView A;               // (dim, dstate), float32: -exp(A_log)
  TensorView D;               // optional (dim), float32
  Weight out_proj;            // (d_model, dim)
  TensorView out_proj_bias;   // optional (d_model)
  float dt_B_C_norm_eps = 0;  // > 0 (FalconMamba): Δ, B and C each pass an RMS norm without weights
};

// A sequence of any length, or the next token (seqlen 1) of running ones:
//   x, z = in_proj(x);  x = SiLU(causal_conv1d(x));  Δ, B, C = x_proj(x)
//   out  = out_proj(selective_scan(x, dt_proj(Δ), A, B, C, D, z, softplus))
//
// On the CPU everything may also be float64, for checking.
struct MambaBlockFwdArgs {
  const MambaBlockWeights* weights = nullptr;
  TensorView x;              // (batch, seqlen, d_model): float32, bfloat16 or float16; contiguous
  TensorView out;            // (batch, seqlen, d_model), x's dtype, written; contiguous
  TensorView conv_state;     // optional (slots, dim, width - 1), x's dtype: read, then updated
  TensorView ssm_state;      // optional (slots, dim, dstate), float32: read, then updated
  TensorView state_indices;  // optional (batch), int32, as in SelectiveScanFwdArgs
  TensorView cu_seqlens;     // optional (sequences + 1), int32: packed, as in SelectiveScanFwdArgs
};

size_t mamba_block_fwd_workspace_size(const MambaBlockFwdArgs& args, const Context& context);

void mamba_block_fwd(const MambaBlockFwdArgs& args, const Exec& exec);

}  // namespace ssmcore
