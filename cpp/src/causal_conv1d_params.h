// What the causal convolution's kernels are given, already checked. See ssmcore/causal_conv1d.h.
#pragma once

#include "ssmcore/causal_conv1d.h"
#include "strided.h"

namespace ssmcore {

struct CausalConv1dFwdParams {
  DType dtype, weight_dtype, bias_dtype;
  int64_t batch, dim, seqlen, width, state_len;
  Activation activation;

  Strided<3> x, out;                      // (batch, dim, seqlen)
  Strided<2> weight;                      // (dim, width)
  Strided<1> bias;                        // (dim)
  Strided<3> initial_state, final_state;  // (slots, dim, state_len)
  Strided<1> state_indices;               // (batch)
};

}  // namespace ssmcore
