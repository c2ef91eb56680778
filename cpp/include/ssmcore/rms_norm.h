// Root-mean-square normalisation with an optional residual addition.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// r = x + residual (without residual: x); out = weight · r / sqrt(mean(r²) + eps), in float32.
struct RmsNormFwdArgs {
  TensorView x;             // (rows, dim): float32, bfloat16 or float16
  TensorView weight;        // (dim): float32, bfloat16 or float16
  TensorView residual;      // optional (rows, dim), any of those dtypes
  TensorView residual_out;  // optional (rows, dim), written: r; may be `residual`'s memory
  TensorView out;           // (rows, dim), written; any of those dtypes
  float eps = 1e-5f;
};

size_t rms_norm_fwd_workspace_size(const RmsNormFwdArgs& args, const Context& context);

void rms_norm_fwd(const RmsNormFwdArgs& args, const Exec& exec);

}  // namespace ssmcore
