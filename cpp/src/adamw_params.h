// What the optimiser's kernels are given, already checked. See ssmcore/adamw.h.
#pragma once

#include <cstdint>

#include "ssmcore/tensor.h"

namespace ssmcore {

struct SumOfSquaresParams {
  int64_t numel;
  const float* x;
  double* out;
};

struct AdamWParams {
  int64_t numel;
  float* weight;        // the parameter, or its master
  void* rounded;        // the parameter that has a master, or null
  DType rounded_dtype;  // bfloat16 or float16
  const float* gradient;
  float *exp_avg, *exp_avg_sq;

  const double* sum_of_squares;  // null: gradients are taken as they are
  double max_norm;               // 0: not clipped

  float one_minus_beta1, beta2, one_minus_beta2;
  float decay;       // 1 - lr · weight_decay
  float step_size;   // lr / (1 - β1^step)
  float sqrt_scale;  // 1 / √(1 - β2^step)
  float eps;
};

}  // namespace ssmcore
