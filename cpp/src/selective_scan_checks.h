// What the selective scan and its backward check alike.
#pragma once

#include "checks.h"
#include "ssmcore/selective_scan.h"

namespace ssmcore {

// Sizes and types that the checks refer to.
struct ScanProblem {
  Dim batch, dim, seqlen, dstate;
  Dim rows;           // sequences, packed or not
  DType dtype;        // of the activations
  DType parameter;    // of D, delta_bias and delta_sum
  DType coefficient;  // of A, constant B and C, and the states
  int64_t parts;      // numbers that make one of B or C: 2 where complex
  int64_t ngroups_B, ngroups_C, ngroups;

  Shape sequences() const { return {batch, dim, seqlen}; }
  // Of initial_state and what has its shape, `any_state` being one of them that is there.
  Shape states(const SelectiveScanFwdArgs& args, const TensorView& any_state) const;
};

// Checks u, delta, A, B, C, D, z, delta_bias and cu_seqlens.
ScanProblem check_scan_inputs(const Checks& check, const SelectiveScanFwdArgs& args);

// The shape of chunk_states, after checking chunk_size.
Shape check_chunks(const Checks& check, const SelectiveScanFwdArgs& args, const ScanProblem& is);

// The same arguments with channels split into `nheads` heads, and varying B and C in four
// dimensions.
SelectiveScanFwdArgs split_heads(const SelectiveScanFwdArgs& args, int64_t nheads);

// The same for B or C, or the gradient of one.
TensorView split_coefficients(const TensorView& tensor, int64_t nheads);

}  // namespace ssmcore
