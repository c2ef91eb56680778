// What the kernels between the losses of positions and that of a training step are given.
#pragma once

#include "strided.h"

namespace ssmcore {

// weight = 1 / num_targets, or 1 / the number of targets that are not ignored where that is 0.
struct LossWeightParams {
  DType index_dtype;
  int64_t rows, ignore_index, num_targets;
  Strided<1> targets;  // (rows)
  float* weight;
};

// loss = weight Σ losses
struct LossSumParams {
  int64_t rows;
  const float* losses;  // (rows)
  const float* weight;
  float* loss;
};

}  // namespace ssmcore
