// AdamW, Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), and the sum of
// squares by which gradients are clipped.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// out = Σ x², summed in float64, in the same order whatever the number of threads.
struct SumOfSquaresArgs {
  TensorView x;    // any shape, contiguous, float32
  TensorView out;  // (1), float64, written
};

size_t sum_of_squares_workspace_size(const SumOfSquaresArgs& args, const Context& context);

void sum_of_squares(const SumOfSquaresArgs& args, const Exec& exec);

// One step of one tensor, in float32, with g the gradient after clipping:
//   exp_avg    ← β1 exp_avg + (1 - β1) g
//   exp_avg_sq ← β2 exp_avg_sq + (1 - β2) g²
//   parameter  ← (1 - lr · weight_decay) parameter
//                - lr · exp_avg / (1 - β1^step) / (√(exp_avg_sq / (1 - β2^step)) + eps)
// All tensors are contiguous, of the parameter's shape.
struct AdamWArgs {
  TensorView parameter;            // float32, bfloat16 or float16, updated
  TensorView master;               // float32, updated: what a parameter of 16 bits is rounded from;
                                   // absent where the parameter is float32
  TensorView gradient;             // float32
  TensorView exp_avg, exp_avg_sq;  // float32, updated; zeros before the first step

  // Optional (1), float64: the sum of squares over all gradients that are clipped together. Where
  // it is not finite, nothing is updated.
  TensorView sum_of_squares;
  // Above 0: gradients are scaled by min(1, max_norm / (√sum_of_squares + 1e-6)).
  double max_norm = 0;

  int64_t step = 1;  // 1 for the first
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.01;
};

void adamw(const AdamWArgs& args, const Exec& exec);

}  // namespace ssmcore
