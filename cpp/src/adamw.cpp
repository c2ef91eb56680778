#include "ssmcore/adamw.h"

#include <cmath>
#include <string>

#include "adamw_params.h"
#include "checks.h"
#include "kernels.h"

namespace ssmcore {
namespace {

constexpr const char* kOp = "adamw";
constexpr const char* kSum = "sum_of_squares";

Shape shape_of(const TensorView& tensor) {
  static constexpr const char* kNames[kMaxRank] = {"size 0", "size 1", "size 2",
                                                   "size 3", "size 4", "size 5"};
  Shape shape{};
  for (int i = 0; i < tensor.rank; ++i) shape.dims[shape.rank++] = Dim{kNames[i], tensor.shape[i]};
  return shape;
}

void require_contiguous(const Checks& check, const TensorView& tensor, const char* name) {
  check.require(!tensor || tensor.is_contiguous(),
                [&] { return std::string(name) + " is not contiguous"; });
}

void require_at_least(const Checks& check, const char* name, double value, double least) {
  check.require(std::isfinite(value) && value >= least, [&] {
    return std::string(name) + " is " + std::to_string(value) + ", expected a number of at least " +
           std::to_string(least);
  });
}

SumOfSquaresParams lower(const SumOfSquaresArgs& args, const Context& context) {
  const Checks check(kSum, context.device());
  check.require(static_cast<bool>(args.x), [] { return std::string("x is missing"); });
  check.input(args.x, "x", shape_of(args.x), {DType::float32});
  require_contiguous(check, args.x, "x");
  check.output(args.out, "out", {{"sums", 1}}, {DType::float64});
  return {args.x.numel(), args.x.as<const float>(), args.out.as<double>()};
}

AdamWParams lower(const AdamWArgs& args, const Context& context) {
  const Checks check(kOp, context.device());
  const TensorView& parameter = args.parameter;
  check.require(static_cast<bool>(parameter), [] { return std::string("parameter is missing"); });
  const Shape shape = shape_of(parameter);
  check.output(parameter, "parameter", shape, kActivationTypes);
  const bool has_master = parameter.dtype != DType::float32;
  check.require(has_master == static_cast<bool>(args.master), [&] {
    return std::string("master is ") + (args.master ? "given" : "missing") +
           " and the parameter's dtype is " + dtype_name(parameter.dtype) +
           ": expected one where that is bfloat16 or float16";
  });
  if (has_master) check.output(args.master, "master", shape, {DType::float32});
  check.input(args.gradient, "gradient", shape, {DType::float32});
  check.output(args.exp_avg, "exp_avg", shape, {DType::float32});
  check.output(args.exp_avg_sq, "exp_avg_sq", shape, {DType::float32});
  require_contiguous(check, parameter, "parameter");
  require_contiguous(check, args.master, "master");
  require_contiguous(check, args.gradient, "gradient");
  require_contiguous(check, args.exp_avg, "exp_avg");
  require_contiguous(check, args.exp_avg_sq, "exp_avg_sq");
  check.optional(args.sum_of_squares, "sum_of_squares", {{"sums", 1}}, {DType::float64});
  require_at_least(check, "max_norm", args.max_norm, 0);
  check.require(args.max_norm == 0 || args.sum_of_squares,
                [] { return std::string("max_norm needs sum_of_squares"); });
  check.require(args.step >= 1,
                [&] { return "step is " + std::to_string(args.step) + ", expected at least 1"; });
  for (const auto& [name, beta] : {std::pair{"beta1", args.beta1}, {"beta2", args.beta2}})
    check.require(beta >= 0 && beta < 1, [&, name = name, beta = beta] {
      return std::string(name) + " is " + std::to_string(beta) + ", expected a number in [0, 1)";
    });
  require_at_least(check, "lr", args.lr, 0);
  require_at_least(check, "eps", args.eps, 0);
  require_at_least(check, "weight_decay", args.weight_decay, 0);

  const auto single = [](double value) { return static_cast<float>(value); };
  const double step = static_cast<double>(args.step);
  AdamWParams params{};
  params.numel = parameter.numel();
  params.weight = (has_master ? args.master : parameter).as<float>();
  params.rounded = has_master ? parameter.data : nullptr;
  params.rounded_dtype = parameter.dtype;
  params.gradient = args.gradient.as<const float>();
  params.exp_avg = args.exp_avg.as<float>();
  params.exp_avg_sq = args.exp_avg_sq.as<float>();
  params.sum_of_squares = args.sum_of_squares.as<const double>();
  params.max_norm = args.max_norm;
  params.one_minus_beta1 = single(1 - args.beta1);
  params.beta2 = single(args.beta2);
  params.one_minus_beta2 = single(1 - args.beta2);
  params.decay = single(1 - args.lr * args.weight_decay);
  params.step_size = single(args.lr / (1 - std::pow(args.beta1, step)));
  params.sqrt_scale = single(1 / std::sqrt(1 - std::pow(args.beta2, step)));
  params.eps = single(args.eps);
  return params;
}

}  // namespace

size_t sum_of_squares_workspace_size(const SumOfSquaresArgs& args, const Context& context) {
  return kernel_table(context).sum_of_squares.workspace_size(lower(args, context), context);
}

void sum_of_squares(const SumOfSquaresArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  Checks(kSum, exec.context.device()).disjoint(args.out, "out", args.x, "x");
  launch(kSum, kernel_table(exec.context).sum_of_squares, params, exec);
}

void adamw(const AdamWArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  const Checks check(kOp, exec.context.device());
  const Named tensors[] = {{args.parameter, "parameter"}, {args.master, "master"},
                           {args.exp_avg, "exp_avg"},     {args.exp_avg_sq, "exp_avg_sq"},
                           {args.gradient, "gradient"},   {args.sum_of_squares, "sum_of_squares"}};
  constexpr int kWritten = 4;
  for (int i = 0; i < kWritten; ++i)
    for (int j = i + 1; j < 6; ++j)
      check.disjoint(tensors[i].tensor, tensors[i].name, tensors[j].tensor, tensors[j].name);
  launch(kOp, kernel_table(exec.context).adamw, params, exec);
}

}  // namespace ssmcore
