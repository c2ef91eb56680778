// What the selective scan's kernels are given, already checked. See ssmcore/selective_scan.h.
#pragma once

#include "strided.h"

namespace ssmcore {

struct SelectiveScanFwdParams {
  DType dtype;  // of u, delta, B, C (where they vary), z and out
  int64_t batch, dim, seqlen, dstate, ngroups;
  bool delta_softplus;

  Strided<3> u, delta, z, out;  // (batch, dim, seqlen)
  Strided<2> A;                 // (dim, dstate)
  // Each of B and C is either constant, (dim, dstate) in float32, or varies, (batch, ngroups,
  // dstate, seqlen); the other one is null.
  Strided<2> constant_B, constant_C;
  Strided<4> B, C;
  Strided<1> D, delta_bias;              // (dim)
  Strided<3> initial_state, last_state;  // (slots, dim, dstate)
  Strided<1> state_indices;              // (batch)
};

}  // namespace ssmcore
