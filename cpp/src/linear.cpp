#include "ssmcore/linear.h"

#include <string>

#include "checks.h"
#include "kernels.h"

namespace ssmcore {
namespace {

constexpr const char* kBwd = "linear_bwd";

void require_dense(const Checks& check, const Weight& weight) {
  check.require(weight.format == WeightFormat::dense, [&] {
    return "weight has format " + std::to_string(static_cast<int>(weight.format)) +
           ", expected dense";
  });
}

LinearParams lower(const LinearArgs& args, const Context& context) {
  const Checks check("linear", context.device());
  const TensorView& weight = args.weight.data;
  require_dense(check, args.weight);
  check.rank(args.x, "x", 2, "(rows, in_features)");
  check.rank(weight, "weight", 2, "(out_features, in_features)");
  const Dim rows{"rows", args.x.shape[0]}, in_features{"in_features", args.x.shape[1]},
      out_features{"out_features", weight.shape[0]};
  check.input(args.x, "x", {rows, in_features}, activation_or_double(context.device()));
  check.input(weight, "weight", {out_features, in_features}, any_beside(args.x.dtype));
  check.require(in_features.size == 1 || weight.strides[1] == 1, [&] {
    return "weight has stride " + std::to_string(weight.strides[1]) +
           " along in_features, expected 1: rows must be contiguous";
  });
  check.optional(args.bias, "bias", {out_features}, any_beside(args.x.dtype));
  check.output(args.out, "out", {rows, out_features}, {args.x.dtype, accumulator_of(args.x.dtype)});

  LinearParams params{};
  params.dtype = args.x.dtype;
  params.weight_dtype = weight.dtype;
  params.bias_dtype = args.bias.dtype;
  params.out_dtype = args.out.dtype;
  params.rows = rows.size;
  params.in_features = in_features.size;
  params.out_features = out_features.size;
  params.x = Strided<2>(args.x);
  params.weight = weight.data;
  params.weight_row_stride = weight.strides[0];
  params.bias = Strided<1>(args.bias);
  params.out = Strided<2>(args.out);
  return params;
}

// Only when it runs: the memory of arguments that ask for a size may be made up.
void check_overlap(const LinearArgs& args, const Context& context) {
  const Checks check("linear", context.device());
  check.disjoint(args.out, "out", args.x, "x");
  check.disjoint(args.out, "out", args.weight.data, "weight");
  check.disjoint(args.out, "out", args.bias, "bias");
}

LinearBwdParams lower(const LinearBwdArgs& args, const Context& context) {
  const Checks check(kBwd, context.device());
  const TensorView& weight = args.weight.data;
  require_dense(check, args.weight);
  check.rank(args.dout, "dout", 2, "(rows, out_features)");
  const Dim rows{"rows", args.dout.shape[0]}, out_features{"out_features", args.dout.shape[1]};
  check.input(args.dout, "dout", {rows, out_features}, activation_or_double(context.device()));
  const auto dtypes = any_beside(args.dout.dtype);

  LinearBwdParams params{};
  if (args.dx.tensor) {
    check.rank(weight, "weight", 2, "(out_features, in_features)");
    params.in_features = weight.shape[1];
  } else if (args.dweight.tensor) {
    check.rank(args.x, "x", 2, "(rows, in_features)");
    params.in_features = args.x.shape[1];
  }
  const Dim in_features{"in_features", params.in_features};
  if (args.dx.tensor) check.input(weight, "weight", {out_features, in_features}, dtypes);
  if (args.dweight.tensor) check.input(args.x, "x", {rows, in_features}, dtypes);
  check.gradient(args.dx, "dx", {rows, in_features}, dtypes);
  check.gradient(args.dweight, "dweight", {out_features, in_features}, dtypes);
  check.gradient(args.dbias, "dbias", {out_features}, dtypes);

  params.x_dtype = args.x.dtype;
  params.weight_dtype = weight.dtype;
  params.dout_dtype = args.dout.dtype;
  params.rows = rows.size;
  params.out_features = out_features.size;
  params.x = Strided<2>(args.x);
  params.weight = Strided<2>(weight);
  params.dout = Strided<2>(args.dout);
  params.dx = StridedGradient<2>(args.dx);
  params.dweight = StridedGradient<2>(args.dweight);
  params.dbias = StridedGradient<1>(args.dbias);
  return params;
}

}  // namespace

size_t linear_workspace_size(const LinearArgs& args, const Context& context) {
  return kernel_table(context).linear.workspace_size(lower(args, context), context);
}

void linear(const LinearArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  check_overlap(args, exec.context);
  launch("linear", kernel_table(exec.context).linear, params, exec);
}

size_t linear_bwd_workspace_size(const LinearBwdArgs& args, const Context& context) {
  return kernel_table(context).linear_bwd.workspace_size(lower(args, context), context);
}

void linear_bwd(const LinearBwdArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  Checks(kBwd, exec.context.device())
      .disjoint_gradients(
          {{args.dx.tensor, "dx"}, {args.dweight.tensor, "dweight"}, {args.dbias.tensor, "dbias"}},
          {{args.x, "x"}, {args.weight.data, "weight"}, {args.dout, "dout"}});
  launch(kBwd, kernel_table(exec.context).linear_bwd, params, exec);
}

}  // namespace ssmcore
