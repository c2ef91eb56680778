// Matrix products with a model's weights.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/tensor.h"
#include "ssmcore/weight.h"

namespace ssmcore {

// out = x weightᵀ + bias, accumulated in float32.
struct LinearArgs {
  TensorView x;     // (rows, in_features): float32, bfloat16 or float16
  Weight weight;    // (out_features, in_features)
  TensorView bias;  // optional (out_features): float32, bfloat16 or float16
  TensorView out;   // (rows, out_features), written; x's dtype or float32
};

size_t linear_workspace_size(const LinearArgs& args, const Context& context);

void linear(const LinearArgs& args, const Exec& exec);

}  // namespace ssmcore
