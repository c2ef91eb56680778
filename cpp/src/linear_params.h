// What the matrix product's kernels are given, already checked. See ssmcore/linear.h.
#pragma once

#include "strided.h"

namespace ssmcore {

struct LinearParams {
  DType dtype, weight_dtype, bias_dtype, out_dtype;
  int64_t rows, in_features, out_features;

  Strided<2> x;        // (rows, in_features)
  const void* weight;  // (out_features, in_features), each row contiguous
  int64_t weight_row_stride;
  Strided<1> bias;  // (out_features)
  Strided<2> out;   // (rows, out_features)
};

struct LinearBwdParams {
  DType x_dtype, weight_dtype, dout_dtype;
  int64_t rows, in_features, out_features;

  Strided<2> x;                // (rows, in_features); with dweight
  Strided<2> weight;           // (out_features, in_features); with dx
  Strided<2> dout;             // (rows, out_features)
  StridedGradient<2> dx;       // (rows, in_features)
  StridedGradient<2> dweight;  // (out_features, in_features)
  StridedGradient<1> dbias;    // (out_features)
};

}  // namespace ssmcore
