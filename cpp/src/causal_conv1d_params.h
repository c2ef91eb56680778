// What the causal convolution's kernels are given, already checked. See ssmcore/causal_conv1d.h.
#pragma once

#include "ssmcore/causal_conv1d.h"
#include "strided.h"

namespace ssmcore {

struct CausalConv1dFwdParams {
  DType dtype, weight_dtype, bias_dtype;
  int64_t rows;  // sequences, packed or not
  int64_t dim, seqlen, width, state_len;
  int64_t slots;  // that the states have room for
  Activation activation;

  Strided<3> x, out;                      // (batch, dim, seqlen)
  Strided<2> weight;                      // (dim, width)
  Strided<1> bias;                        // (dim)
  Strided<3> initial_state, final_state;  // (slots, dim, state_len)
  Strided<1> state_indices;               // (rows)
  Strided<1> cu_seqlens;                  // (rows + 1)
  Strided<2> seq_idx;                     // (batch, seqlen)
  Strided<1> cache_seqlens;               // (rows): the states are circular
};

struct CausalConv1dBwdParams {
  CausalConv1dFwdParams fwd;  // the inputs; out, final_state and cache_seqlens are null

  Strided<3> dout;                    // (batch, dim, seqlen)
  Strided<3> dfinal_state;            // (slots, dim, state_len)
  StridedGradient<3> dx;              // (batch, dim, seqlen)
  StridedGradient<2> dweight;         // (dim, width)
  StridedGradient<1> dbias;           // (dim)
  StridedGradient<3> dinitial_state;  // (slots, dim, state_len)
};

}  // namespace ssmcore
