// Gradient: where the backward of an operator puts the gradient of one of its inputs.
#pragma once

#include "ssmcore/tensor.h"

namespace ssmcore {

// An empty view skips the gradient. For a complex tensor x + iy it is dx + i dy, as PyTorch has it.
struct Gradient {
  TensorView tensor;
  bool accumulate = false;  // add to what is there, instead of overwriting it
};

}  // namespace ssmcore
