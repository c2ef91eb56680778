// The weights of a model before its training.
#pragma once

#include <cstdint>

#include "ssmcore/checkpoint.h"
#include "ssmcore/model_config.h"

namespace ssmcore {

// Random float32 weights as the published implementation draws them, under transformers' names. The
// same seed gives the same weights.
// - A_log: log(1 … dstate) in every row; D and the norms: 1.
// - dt_proj.weight: uniform in ±dt_rank^-½; dt_proj.bias: softplus of it is log-uniform in
//   [1e-3, 1e-1].
// - embedding: normal with standard deviation 0.02.
// - Other matrices and the convolution, its bias too: uniform in ±fan_in^-½, with out_proj divided
//   by √layers. Biases of in_proj and out_proj: 0.
Checkpoint initial_checkpoint(const ModelConfig& config, uint64_t seed);

}  // namespace ssmcore
