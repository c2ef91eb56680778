// Training a Mamba block: a forward pass that keeps what its backward pass needs.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/gradient.h"
#include "ssmcore/mamba_block.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// Steps between two states of MambaBlockSaved::chunk_states.
inline constexpr int64_t kMambaBlockChunkSize = 32;

// What the forward pass leaves for the backward pass, in the caller's memory; each contiguous and,
// unless said otherwise, of x's dtype. The last two are computed again where they are absent.
struct MambaBlockSaved {
  TensorView xz;            // (batch, seqlen, 2 dim): in_proj's result
  TensorView delta_B_C;     // (batch, seqlen, dt_rank + 2 dstate): x_proj's result, not normalised
  TensorView y;             // (batch, seqlen, dim): the scan's result, gated
  TensorView chunk_states;  // (batch, chunks, dim, dstate), float32: the scan's, as in
                            // SelectiveScanFwdArgs with chunk_size kMambaBlockChunkSize
  TensorView u;             // optional (batch, seqlen, dim): the convolution's result
  TensorView delta;         // optional (batch, seqlen, dim): dt_proj's result
};

// mamba_block_fwd, leaving its arguments as they are. Without state_indices: row b, or packed
// sequence b, has row b of the states.
struct MambaBlockTrainFwdArgs {
  const MambaBlockWeights* weights = nullptr;
  TensorView x;                   // (batch, seqlen, d_model), as in MambaBlockFwdArgs
  TensorView out;                 // (batch, seqlen, d_model), written
  TensorView initial_conv_state;  // optional (rows, dim, width - 1), x's dtype; absent: zeros
  TensorView initial_ssm_state;   // optional (rows, dim, dstate), float32; absent: zeros
  TensorView final_conv_state;    // optional, written
  TensorView last_ssm_state;      // optional, written
  TensorView cu_seqlens;          // optional (rows + 1), int32: packed
  MambaBlockSaved saved;          // written
};

size_t mamba_block_train_fwd_workspace_size(const MambaBlockTrainFwdArgs& args,
                                            const Context& context);

void mamba_block_train_fwd(const MambaBlockTrainFwdArgs& args, const Exec& exec);

// Each is optional and has its weight's shape; float32 or its weight's dtype.
struct MambaBlockWeightGradients {
  Gradient in_proj, in_proj_bias, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj,
      out_proj_bias;
  Gradient A_log;  // instead of A: of A = -exp(A_log), which is dA · A
};

// The gradients of a loss by what mamba_block_train_fwd read, from those by what it wrote.
struct MambaBlockBwdArgs {
  // As the forward had and wrote them.
  const MambaBlockWeights* weights = nullptr;
  TensorView x, initial_conv_state, initial_ssm_state, cu_seqlens;
  MambaBlockSaved saved;

  TensorView dout;               // (batch, seqlen, d_model), x's dtype, contiguous
  TensorView dfinal_conv_state;  // optional (rows, dim, width - 1), x's dtype; absent: zeros
  TensorView dlast_ssm_state;    // optional (rows, dim, dstate), float32; absent: zeros

  Gradient dx;                   // optional (batch, seqlen, d_model), x's dtype, contiguous
  Gradient dinitial_conv_state;  // optional, only with initial_conv_state, its shape and dtype
  Gradient dinitial_ssm_state;   // optional, only with initial_ssm_state, its shape and dtype
  MambaBlockWeightGradients dweights;
};

size_t mamba_block_bwd_workspace_size(const MambaBlockBwdArgs& args, const Context& context);

void mamba_block_bwd(const MambaBlockBwdArgs& args, const Exec& exec);

}  // namespace ssmcore
