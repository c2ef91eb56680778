// One step of the selective scan, for decoding.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// The recurrence of selective_scan.h for one time step, updating `state` in place. The same code
// computes both, so stepping and scanning agree. dim may be two dimensions, (nheads, headdim), in
// every operand (Mamba-2, whose A, dt and dt_bias are one number a head: strides of 0).
struct SelectiveStateUpdateArgs {
  TensorView state;  // (slots, dim, dstate), float32 or as A complex64, updated; slots = batch
                     // without state_indices
  TensorView x;      // (batch, dim): float32, bfloat16 or float16
  TensorView dt;     // (batch, dim), x's dtype
  TensorView A;      // (dim, dstate), float32 or complex64
  TensorView B;      // (batch, dstate) or (batch, ngroups, dstate), x's dtype, ngroups dividing dim
                     // (nheads); for complex A (…, dstate, 2)
  TensorView C;      // like B
  TensorView D;      // optional (dim), float32
  TensorView z;      // optional (batch, dim), x's dtype
  TensorView dt_bias;  // optional (dim), float32
  bool dt_softplus = false;
  TensorView state_indices;  // optional (batch), int32, as in SelectiveScanFwdArgs
  TensorView out;            // (batch, dim), x's dtype, written
};

size_t selective_state_update_workspace_size(const SelectiveStateUpdateArgs& args,
                                             const Context& context);

void selective_state_update(const SelectiveStateUpdateArgs& args, const Exec& exec);

}  // namespace ssmcore
