// One token of a few rows through a whole layer, residual += mixer(norm(residual)): what the GPU
// has kernels of its own for, since launches would take longer than the work.
#pragma once

#include <cstdint>

#include "ssmcore/tensor.h"

namespace ssmcore {

struct MambaStepParams {
  static constexpr int64_t kMaxRows = 4, kWidth = 4, kDstate = 16;

  DType dtype;  // of activations, matrices and the convolution's state: rows without gaps
  int64_t rows, slots, d_model, dim, dt_rank;
  float eps;
  float* residual;    // (rows, d_model), updated
  const float* norm;  // (d_model)
  const void *in_proj, *x_proj, *dt_proj, *out_proj;
  const float *in_proj_bias, *out_proj_bias;    // optional
  const float *conv_weight, *conv_bias;         // (kWidth, dim); optional (dim)
  const float *dt_bias, *A, *D;                 // (dim), (kDstate, dim), (dim)
  void* conv_state;                             // (slots, kWidth - 1, dim)
  float* ssm_state;                             // (slots, kDstate, dim)
  int64_t conv_state_stride, ssm_state_stride;  // of a slot, in elements
  const int32_t* state_indices;                 // (rows)
  void *u, *z, *y;                              // (rows, dim): scratch
  float* delta_B_C;                             // (rows, dt_rank + 2 kDstate): scratch
};

}  // namespace ssmcore
