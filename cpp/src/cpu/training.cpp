// What training does between the operators, on the CPU: small, and compiled once.
#include "../parameter_params.h"
#include "../training_loss_params.h"
#include "ssmcore/context.h"

namespace ssmcore::cpu {
namespace {

template <typename T>
T& at(const Strided<2>& tensor, int64_t row, int64_t col) {
  return static_cast<T*>(tensor.data)[row * tensor.stride[0] + col * tensor.stride[1]];
}

template <typename T>
void multiply(const ParameterProductParams& p) {
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t col = 0; col < p.cols; ++col) {
      const T product = at<T>(p.a, row, col) * at<T>(p.b, row, col);
      T& to = at<T>(p.to, row, col);
      to = p.to.accumulate ? to + product : product;
    }
}

}  // namespace

size_t parameter_copy_workspace_size(const ParameterCopyParams&, const Context&) {
  return 0;
}

// On the CPU weights of any activation type are used as float32.
void parameter_copy(const ParameterCopyParams& p, const Exec&) {
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t col = 0; col < p.cols; ++col)
      at<float>(p.to, row, col) = apply(p.map, at<float>(p.from, row, col));
}

size_t parameter_product_workspace_size(const ParameterProductParams&, const Context&) {
  return 0;
}

void parameter_product(const ParameterProductParams& p, const Exec&) {
  if (p.dtype == DType::float64)
    multiply<double>(p);
  else
    multiply<float>(p);
}

size_t loss_weight_workspace_size(const LossWeightParams&, const Context&) {
  return 0;
}

void loss_weight(const LossWeightParams& p, const Exec&) {
  int64_t count = p.num_targets;
  if (count == 0)
    for (int64_t row = 0; row < p.rows; ++row)
      count +=
          integer_at(p.targets.data, p.index_dtype, row * p.targets.stride[0]) != p.ignore_index;
  *p.weight = 1 / static_cast<float>(count);
}

size_t loss_sum_workspace_size(const LossSumParams&, const Context&) {
  return 0;
}

void loss_sum(const LossSumParams& p, const Exec&) {
  double sum = 0;
  for (int64_t row = 0; row < p.rows; ++row) sum += p.losses[row];
  *p.loss = static_cast<float>(sum * static_cast<double>(*p.weight));
}

}  // namespace ssmcore::cpu
