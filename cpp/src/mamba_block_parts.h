// What the forward and backward passes of a Mamba block have in common.
#pragma once

#include "checks.h"
#include "ssmcore/causal_conv1d.h"
#include "ssmcore/gradient.h"
#include "ssmcore/mamba_block.h"
#include "ssmcore/mamba_block_train.h"
#include "ssmcore/rms_norm.h"

namespace ssmcore {

// The sizes of one call, all read from x and the weights.
struct MambaBlockSizes {
  Dim batch, seqlen, d_model, dim, dstate, dt_rank, width;
  int64_t rows;     // that have a state each: packed sequences, or the batch
  DType dtype;      // of the activations
  DType parameter;  // of A, D, dt_bias and the scan's states

  // Checks x, every weight and cu_seqlens.
  MambaBlockSizes(const Checks& check, const MambaBlockWeights* weights, const TensorView& x,
                  const TensorView& cu_seqlens);
  // Of x_proj's result.
  Dim delta_B_C() const { return {"dt_rank + 2 dstate", dt_rank.size + 2 * dstate.size}; }
};

// x_proj's result, (batch, seqlen, dt_rank + 2 dstate), in its parts.
struct DeltaBC {
  TensorView delta, B, C;

  DeltaBC(const TensorView& all, const MambaBlockSizes& sizes)
      : delta(all.slice(2, 0, sizes.dt_rank.size)),
        B(all.slice(2, sizes.dt_rank.size, sizes.dstate.size)),
        C(all.slice(2, sizes.dt_rank.size + sizes.dstate.size, sizes.dstate.size)) {}
};

// (batch, seqlen, n), contiguous or a slice along n of such, as (batch · seqlen, n).
inline TensorView as_rows(const TensorView& tensor) {
  TensorView rows = tensor.select(0, 0);
  if (tensor.shape[1] == 1) rows.strides[0] = tensor.strides[0];
  rows.shape[0] = tensor.shape[0] * tensor.shape[1];
  return rows;
}

// Token-major (batch, seqlen, n) as the operators' (batch, n, seqlen).
inline TensorView channels_first(const TensorView& tensor) {
  return tensor.transpose(1, 2);
}

void check_contiguous(const Checks& check, const TensorView& tensor, const char* name);

// Checks what is kept for the backward pass: `input` where it is read, `output` where written.
void check_saved(const Checks& check, const MambaBlockSaved& saved, const MambaBlockSizes& sizes,
                 decltype(&Checks::input) input_or_output);

// The convolution from in_proj's x half to u, both (batch, seqlen, dim), without states.
CausalConv1dFwdArgs mamba_block_conv(const TensorView& x, const TensorView& u,
                                     const MambaBlockWeights& weights);

// The norm of Δ, B or C, (batch, seqlen, n), where the block has them.
RmsNormFwdArgs mamba_block_norm(const TensorView& x, const TensorView& out, float eps);

}  // namespace ssmcore
