// One token of each row through a whole layer, residual += mixer(norm(residual)): what the GPU has
// kernels of its own for, since launches would take longer than the work.
#pragma once

#include <cstdint>

#include "ssmcore/tensor.h"
#include "strided.h"

namespace ssmcore {

struct MambaStepParams {
  static constexpr int64_t kWidth = 4, kDstate = 16;

  DType dtype;  // of activations, matrices and the convolution's state: rows without gaps
  int64_t rows, slots, d_model, dim, dt_rank;
  float eps;
  bool is_first;                  // of the layers of a token
  const float *norm, *next_norm;  // (d_model); of the layer after, null for the last
  const void *in_proj, *x_proj, *dt_proj, *out_proj;
  const float *in_proj_bias, *out_proj_bias;  // optional
  const float *conv_weight, *conv_bias;       // (kWidth, dim); optional (dim)
  const float *dt_bias, *A, *D;               // (dim), (kDstate, dim), (dim)

  float* residual;                              // (rows, d_model), updated
  void* conv_state;                             // (slots, kWidth - 1, dim), updated
  float* ssm_state;                             // (slots, kDstate, dim), updated
  int64_t conv_state_stride, ssm_state_stride;  // of a slot, in elements
  const int32_t* state_indices;                 // (rows)

  // Scratch: (rows, dim) each, and (rows, dt_rank + 2 kDstate).
  void *u, *z, *y;
  float* delta_B_C;
  // What a layer may leave for the next: (rows, d_model) and (d_model / 16, rows).
  void* x;
  float* squares;
};

}  // namespace ssmcore
