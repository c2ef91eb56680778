// Matrix products with a model's weights.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/gradient.h"
#include "ssmcore/tensor.h"
#include "ssmcore/weight.h"

namespace ssmcore {

// out = x weightᵀ + bias, accumulated in float32. Or everything is float64, for checking on the
// CPU.
struct LinearArgs {
  TensorView x;     // (rows, in_features): float32, bfloat16 or float16
  Weight weight;    // (out_features, in_features)
  TensorView bias;  // optional (out_features): float32, bfloat16 or float16
  TensorView out;   // (rows, out_features), written; x's dtype or float32
};

size_t linear_workspace_size(const LinearArgs& args, const Context& context);

void linear(const LinearArgs& args, const Exec& exec);

// dx = dout weight, dweight = doutᵀ x, dbias = Σ dout over the rows, accumulated in float32.
struct LinearBwdArgs {
  TensorView x;     // (rows, in_features); only needed for dweight
  Weight weight;    // (out_features, in_features); only needed for dx
  TensorView dout;  // (rows, out_features): float32, bfloat16 or float16, as all that follow

  // Each is optional, and overlaps no input and no other gradient.
  Gradient dx;       // (rows, in_features)
  Gradient dweight;  // (out_features, in_features)
  Gradient dbias;    // (out_features)
};

size_t linear_bwd_workspace_size(const LinearBwdArgs& args, const Context& context);

void linear_bwd(const LinearBwdArgs& args, const Exec& exec);

}  // namespace ssmcore
