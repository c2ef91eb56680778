// Operators in float64, for checking gradients and other kernels: their formulas, step by step.
// Compiled once, and run by one thread.
#pragma once

#include <cmath>

#include "../causal_conv1d_params.h"
#include "../cross_entropy_params.h"
#include "../embedding_params.h"
#include "../linear_params.h"
#include "../rms_norm_params.h"

namespace ssmcore::cpu {

void causal_conv1d_fwd_float64(const CausalConv1dFwdParams& params);
void causal_conv1d_bwd_float64(const CausalConv1dBwdParams& params);
void rms_norm_fwd_float64(const RmsNormFwdParams& params);
// `scratch`: 3 dim numbers.
void rms_norm_bwd_float64(const RmsNormBwdParams& params, double* scratch);
void linear_float64(const LinearParams& params);
void linear_bwd_float64(const LinearBwdParams& params);
void embedding_float64(const EmbeddingParams& params);
void embedding_bwd_float64(const EmbeddingBwdParams& params);
void cross_entropy_fwd_float64(const CrossEntropyFwdParams& params);
void cross_entropy_bwd_float64(const CrossEntropyBwdParams& params);

// What the operators in float64 share.
namespace float64 {

template <int Rank, typename... Index>
double& at(const Strided<Rank>& tensor, Index... index) {
  static_assert(sizeof...(Index) == Rank);
  int64_t offset = 0;
  int dim = 0;
  ((offset += index * tensor.stride[dim++]), ...);
  return static_cast<double*>(tensor.data)[offset];
}

// Overwritten by, or increased by, a value; nothing where it is not wanted.
template <int Rank, typename... Index>
void put(const StridedGradient<Rank>& gradient, double value, Index... index) {
  if (!gradient) return;
  double& to = at(static_cast<const Strided<Rank>&>(gradient), index...);
  to = gradient.accumulate ? to + value : value;
}

inline int64_t integer(const Strided<1>& tensor, DType dtype, int64_t index) {
  return integer_at(tensor.data, dtype, index * tensor.stride[0]);
}

inline double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}
inline double silu(double x) {
  return x * sigmoid(x);
}
inline double softplus(double x) {
  return x > 20 ? x : std::log1p(std::exp(x));
}
inline double silu_slope(double x) {
  return sigmoid(x) * (1 + x * (1 - sigmoid(x)));
}

}  // namespace float64
}  // namespace ssmcore::cpu
