#include "ssmcore/linear.h"

#include <string>

#include "checks.h"
#include "kernels.h"

namespace ssmcore {
namespace {

LinearParams lower(const LinearArgs& args, const Context& context) {
  const Checks check("linear", context.device());
  const TensorView& weight = args.weight.data;
  check.require(args.weight.format == WeightFormat::dense, [&] {
    return "weight has format " + std::to_string(static_cast<int>(args.weight.format)) +
           ", expected dense";
  });
  check.rank(args.x, "x", 2, "(rows, in_features)");
  check.rank(weight, "weight", 2, "(out_features, in_features)");
  const Dim rows{"rows", args.x.shape[0]}, in_features{"in_features", args.x.shape[1]},
      out_features{"out_features", weight.shape[0]};
  check.input(args.x, "x", {rows, in_features}, kActivationTypes);
  check.input(weight, "weight", {out_features, in_features}, kActivationTypes);
  check.require(in_features.size == 1 || weight.strides[1] == 1, [&] {
    return "weight has stride " + std::to_string(weight.strides[1]) +
           " along in_features, expected 1: rows must be contiguous";
  });
  check.optional(args.bias, "bias", {out_features}, kActivationTypes);
  check.output(args.out, "out", {rows, out_features}, {args.x.dtype, DType::float32});

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

}  // namespace

size_t linear_workspace_size(const LinearArgs& args, const Context& context) {
  return kernel_table(context).linear.workspace_size(lower(args, context), context);
}

void linear(const LinearArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  check_overlap(args, exec.context);
  launch("linear", kernel_table(exec.context).linear, params, exec);
}

}  // namespace ssmcore
