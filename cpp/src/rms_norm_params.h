// What the RMS norm's kernels are given, already checked. See ssmcore/rms_norm.h.
#pragma once

#include "strided.h"

namespace ssmcore {

struct RmsNormFwdParams {
  DType dtype, weight_dtype, residual_dtype, residual_out_dtype, z_dtype, out_dtype;
  int64_t rows, dim, group_size;
  bool norm_before_gate;
  float eps;

  Strided<2> x, residual, residual_out, z, out;  // (rows, dim)
  Strided<1> weight;                             // (dim)
};

struct RmsNormBwdParams {
  RmsNormFwdParams fwd;  // the inputs; out and residual_out are null
  DType dout_dtype, dresidual_out_dtype;

  Strided<2> dout, dresidual_out;        // (rows, dim)
  StridedGradient<2> dx, dresidual, dz;  // (rows, dim)
  StridedGradient<1> dweight;            // (dim)
};

}  // namespace ssmcore
