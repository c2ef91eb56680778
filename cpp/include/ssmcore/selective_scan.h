// The selective scan (Gu & Dao, arXiv 2312.00752, algorithm 2) over a whole sequence.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/gradient.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// For every batch b, channel d and state n, with Δ = softplus?(delta + delta_bias):
//
//   h[n](t) = exp(Δ(t) A[d, n]) h[n](t - 1) + Δ(t) B[n](t) u(t)
//   y(t)    = Σ_n C[n](t) h[n](t) + D[d] u(t)        (complex A: 2 Re Σ_n C[n](t) h[n](t) + …)
//   out(t)  = y(t) SiLU(z(t))                        (without z: y(t))
//
// Activation type: float32, bfloat16 or float16, one for u, delta, B, C, z and out; A, D,
// delta_bias, states and accumulation are float32. Or everything is float64, for checking. Any
// non-negative strides.
//
// A may be complex64 (S4D and S5 are this case): constant B and C and the states are then complex64
// too, and varying B and C hold real and imaginary parts side by side, (…, dstate, 2 seqlen).
struct SelectiveScanFwdArgs {
  TensorView u;           // (batch, dim, seqlen)
  TensorView delta;       // (batch, dim, seqlen)
  TensorView A;           // (dim, dstate), float32 or complex64
  TensorView B;           // (dim, dstate), A's dtype: constant in time; (batch, dstate, seqlen); or
                          // (batch, ngroups, dstate, seqlen), ngroups dividing dim
  TensorView C;           // like B, independently of it
  TensorView D;           // optional (dim)
  TensorView z;           // optional (batch, dim, seqlen)
  TensorView delta_bias;  // optional (dim)
  bool delta_softplus = false;

  // Packed sequences: batch is 1, and sequence s is the steps [cu_seqlens[s], cu_seqlens[s + 1]).
  // What is said of rows below then holds of sequences. An empty one's last state is its initial
  // state.
  TensorView cu_seqlens;  // optional (sequences + 1), int32: from 0, ascending, to seqlen

  // States are (slots, dim, dstate), float32 or complex64 as A. Without state_indices slots = batch
  // and row b uses slot b. The two may be the same memory.
  TensorView initial_state;  // optional; absent: zeros
  TensorView last_state;     // optional, written: h after the last step
  TensorView state_indices;  // optional (batch), int32: the slot of each row; negative: starts from
                             // zeros and leaves nothing. The entries that are not negative differ.

  // On request, what it takes to resume in the middle of a row, or to split one over devices.
  TensorView chunk_states;  // optional (batch, chunks, dim, dstate), written: h after every
                            // chunk_size steps and after the last, chunks = ⌈seqlen / chunk_size⌉;
                            // packed: (1, Σ ⌈length / chunk_size⌉, dim, dstate), in order
  int64_t chunk_size = 0;   // > 0 with chunk_states
  TensorView delta_sum;     // optional (batch, dim), float32, written: Σ_t Δ(t)

  TensorView out;  // (batch, dim, seqlen), written; overlaps no input
};

size_t selective_scan_fwd_workspace_size(const SelectiveScanFwdArgs& args, const Context& context);

// Throws Error(invalid_argument) naming the tensor that does not fit.
void selective_scan_fwd(const SelectiveScanFwdArgs& args, const Exec& exec);

// The gradients of a scalar whose gradients with respect to out and last_state are given. Running
// backward with dy = dout SiLU(z), and with overlines for complex conjugates:
//
//   dh[n](t) = C̄[n](t) dy(t) + exp(Δ(t + 1) Ā[d, n]) dh[n](t + 1)          (complex A: 2 C̄ dy + …)
//   q[n](t)  = dh[n](t) exp(Δ(t) Ā[d, n]) h̄[n](t - 1)
//
//   dA[d, n] = Σ_t Δ(t) q[n](t)
//   dB[n](t) = Σ_d dh[n](t) Δ(t) u(t)
//   dC[n](t) = Σ_d h̄[n](t) dy(t)                                            (complex A: 2 h̄ dy)
//   du(t)    = Δ(t) Re Σ_n dh[n](t) B̄[n](t) + D[d] dy(t)
//   dΔ(t)    = Re Σ_n (dh[n](t) B̄[n](t) u(t) + q[n](t) Ā[d, n])
//
// The states h are computed again, from chunk_states where the forward saved them.
struct SelectiveScanBwdArgs {
  // As the forward had them.
  TensorView u, delta, A, B, C, D, z, delta_bias;
  bool delta_softplus = false;
  TensorView cu_seqlens;
  TensorView initial_state;  // as it was before the forward
  TensorView state_indices;  // of initial_state, dlast_state and dinitial_state
  TensorView chunk_states;  // optional: as the forward wrote them. Absent, they are computed again,
  int64_t chunk_size = 0;   // for about one more forward's time. On a GPU 32 is the fastest, and
                            // those of longer chunks are computed again; on a CPU 64 is

  TensorView dout;         // (batch, dim, seqlen), u's dtype
  TensorView dlast_state;  // optional (slots, dim, dstate), A's dtype; absent: zeros

  // Each is optional, has the shape and dtype of its input, and overlaps no input and no other
  // gradient. Slots that state_indices does not name are left as they are.
  Gradient du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state;
};

size_t selective_scan_bwd_workspace_size(const SelectiveScanBwdArgs& args, const Context& context);

// Throws Error(invalid_argument) naming the tensor that does not fit. Same bits whatever the number
// of threads.
void selective_scan_bwd(const SelectiveScanBwdArgs& args, const Exec& exec);

}  // namespace ssmcore
