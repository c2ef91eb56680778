// Root-mean-square normalisation with an optional residual addition and an optional gate.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/gradient.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// r = x + residual (without residual: x), in float32. Without a gate
//
//   out = norm(r),  norm(v) = weight · v / sqrt(mean(v²) + eps)
//
// the mean being over each group of group_size elements; with one (Mamba-2), out = norm(r SiLU(z)),
// or norm(r) SiLU(z) if norm_before_gate. Or everything is float64, for checking on the CPU.
struct RmsNormFwdArgs {
  TensorView x;             // (rows, dim): float32, bfloat16 or float16
  TensorView weight;        // optional (dim): float32, bfloat16 or float16; absent: ones
  TensorView residual;      // optional (rows, dim), any of those dtypes
  TensorView residual_out;  // optional (rows, dim), written: r; may be `residual`'s memory
  TensorView z;             // optional (rows, dim), any of those dtypes
  TensorView out;           // (rows, dim), written; any of those dtypes; may be x's memory
  int64_t group_size = 0;   // divides dim; 0: dim
  bool norm_before_gate = false;
  float eps = 1e-5f;
};

size_t rms_norm_fwd_workspace_size(const RmsNormFwdArgs& args, const Context& context);

void rms_norm_fwd(const RmsNormFwdArgs& args, const Exec& exec);

// The gradients of a loss with respect to what rms_norm_fwd read, from those with respect to what
// it wrote. Instead of x and residual, x may be r alone, which the forward has left in
// residual_out.
struct RmsNormBwdArgs {
  TensorView x, weight, residual, z;  // as in RmsNormFwdArgs
  int64_t group_size = 0;
  bool norm_before_gate = false;
  float eps = 1e-5f;

  TensorView dout;           // (rows, dim), any activation type, as all that follow
  TensorView dresidual_out;  // optional (rows, dim)

  // Each is optional, and overlaps no input and no other gradient; but dx may be dout's or
  // dresidual_out's memory, and dresidual dresidual_out's.
  Gradient dx;         // (rows, dim): with respect to r, and so to x
  Gradient dresidual;  // (rows, dim): the same, in a dtype of its own; also without residual
  Gradient dz;         // (rows, dim); only with z
  Gradient dweight;    // (dim); only with weight
};

size_t rms_norm_bwd_workspace_size(const RmsNormBwdArgs& args, const Context& context);

void rms_norm_bwd(const RmsNormBwdArgs& args, const Exec& exec);

}  // namespace ssmcore
