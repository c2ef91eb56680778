// What the selective scan's kernels are given, already checked. See ssmcore/selective_scan.h.
#pragma once

#include "ssmcore/selective_scan.h"
#include "strided.h"

namespace ssmcore {

// Channels are (nheads, headdim): the groups of B and C and the channels of each, or Mamba-2's
// heads. Head h uses group h / (nheads / ngroups).
struct SelectiveScanFwdParams {
  DType dtype;   // of u, delta, B, C (where they vary), z and out; the rest is float32, or float64
                 // where this is
  bool complex;  // A, constant B and C and states are complex64; B and C hold pairs
  int64_t rows;  // sequences, packed or not
  int64_t seqlen, nheads, headdim, dstate, ngroups, chunk_size;
  int64_t slots, chunks;  // that the states (where there are any) and chunk_states have room for
  bool delta_softplus;

  Strided<4> u, delta, z, out;  // (batch, nheads, headdim, seqlen)
  Strided<3> A;                 // (nheads, headdim, dstate)
  // Each of B and C is either constant, (nheads, headdim, dstate), or varies, (batch, ngroups,
  // dstate, seqlen); the other one is null.
  Strided<3> constant_B, constant_C;
  Strided<4> B, C;
  Strided<2> D, delta_bias;              // (nheads, headdim)
  Strided<4> initial_state, last_state;  // (slots, nheads, headdim, dstate)
  Strided<5> chunk_states;               // (batch, chunks, nheads, headdim, dstate)
  Strided<3> delta_sum;                  // (rows, nheads, headdim)
  Strided<1> state_indices;              // (rows)
  Strided<1> cu_seqlens;                 // (rows + 1)
};

struct SelectiveScanBwdParams {
  SelectiveScanFwdParams fwd;    // the inputs; chunk_states are read, other outputs are null
  int64_t ngroups_B, ngroups_C;  // of B and C themselves: 1, or ngroups

  Strided<4> dout;         // (batch, nheads, headdim, seqlen)
  Strided<4> dlast_state;  // (slots, nheads, headdim, dstate)

  // Shaped as their inputs; of each of dB and dC at most one form is there.
  StridedGradient<4> du, ddelta, dz;
  StridedGradient<3> dA, constant_dB, constant_dC;
  StridedGradient<4> dB, dC;
  StridedGradient<2> dD, ddelta_bias;
  StridedGradient<4> dinitial_state;
};

// From arguments whose channels are split into heads, (batch, nheads, headdim, seqlen) and so on,
// and whose varying B and C have four dimensions.
SelectiveScanFwdParams make_scan_params(const SelectiveScanFwdArgs& heads, int64_t ngroups);

}  // namespace ssmcore
