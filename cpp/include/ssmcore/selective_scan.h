// The selective scan (Gu & Dao, arXiv 2312.00752, algorithm 2) over a whole sequence.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// For every batch b, channel d and state n, with Δ = softplus?(delta + delta_bias):
//
//   h[n](t) = exp(Δ(t) A[d, n]) h[n](t - 1) + Δ(t) B[n](t) u(t)
//   y(t)    = Σ_n C[n](t) h[n](t) + D[d] u(t)
//   out(t)  = y(t) SiLU(z(t))            (without z: y(t))
//
// Activation type: float32, bfloat16 or float16, one for u, delta, B, C, z and out; states and
// accumulation are float32. Any non-negative strides.
struct SelectiveScanFwdArgs {
  TensorView u;           // (batch, dim, seqlen)
  TensorView delta;       // (batch, dim, seqlen)
  TensorView A;           // (dim, dstate), float32
  TensorView B;           // (dim, dstate) float32: constant in time; (batch, dstate, seqlen); or
                          // (batch, ngroups, dstate, seqlen), ngroups dividing dim
  TensorView C;           // like B, independently of it
  TensorView D;           // optional (dim), float32
  TensorView z;           // optional (batch, dim, seqlen)
  TensorView delta_bias;  // optional (dim), float32
  bool delta_softplus = false;

  // States are (slots, dim, dstate), float32. Without state_indices slots = batch and row b uses
  // slot b. The two may be the same memory.
  TensorView initial_state;  // optional; absent: zeros
  TensorView last_state;     // optional, written: h after the last step
  TensorView state_indices;  // optional (batch), int32: the slot of each row; negative: starts from
                             // zeros and leaves nothing. The entries that are not negative differ.

  TensorView out;  // (batch, dim, seqlen), written; overlaps no input
};

size_t selective_scan_fwd_workspace_size(const SelectiveScanFwdArgs& args, const Context& context);

// Throws Error(invalid_argument) naming the tensor that does not fit.
void selective_scan_fwd(const SelectiveScanFwdArgs& args, const Exec& exec);

}  // namespace ssmcore
