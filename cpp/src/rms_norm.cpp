#include "ssmcore/rms_norm.h"

#include "checks.h"
#include "kernels.h"

namespace ssmcore {
namespace {

constexpr const char* kBwd = "rms_norm_bwd";

// What forward and backward read.
template <typename Args>
RmsNormFwdParams lower_inputs(const Args& args, const Checks& check, Device device) {
  check.rank(args.x, "x", 2, "(rows, dim)");
  const Dim rows{"rows", args.x.shape[0]}, dim{"dim", args.x.shape[1]};
  check.input(args.x, "x", {rows, dim}, activation_or_double(device));
  const auto dtypes = any_beside(args.x.dtype);
  check.optional(args.weight, "weight", {dim}, dtypes);
  check.optional(args.residual, "residual", {rows, dim}, dtypes);
  check.optional(args.z, "z", {rows, dim}, dtypes);
  check.require(args.eps >= 0,
                [&] { return "eps is " + std::to_string(args.eps) + ", expected at least 0"; });

  const int64_t group_size = args.group_size == 0 ? dim.size : args.group_size;
  check.require(group_size > 0 && dim.size % group_size == 0, [&] {
    return "group_size is " + std::to_string(args.group_size) + ", which does not divide dim " +
           std::to_string(dim.size);
  });

  RmsNormFwdParams params{};
  params.dtype = args.x.dtype;
  params.weight_dtype = args.weight.dtype;
  params.residual_dtype = args.residual.dtype;
  params.z_dtype = args.z.dtype;
  params.rows = rows.size;
  params.dim = dim.size;
  params.group_size = group_size;
  params.norm_before_gate = args.norm_before_gate;
  params.eps = args.eps;
  params.x = Strided<2>(args.x);
  params.residual = Strided<2>(args.residual);
  params.z = Strided<2>(args.z);
  params.weight = Strided<1>(args.weight);
  return params;
}

RmsNormFwdParams lower(const RmsNormFwdArgs& args, const Context& context) {
  const Checks check("rms_norm", context.device());
  RmsNormFwdParams params = lower_inputs(args, check, context.device());
  const Shape shape{{"rows", params.rows}, {"dim", params.dim}};
  const auto dtypes = any_beside(params.dtype);
  if (args.residual_out) check.output(args.residual_out, "residual_out", shape, dtypes);
  check.output(args.out, "out", shape, dtypes);
  params.residual_out_dtype = args.residual_out.dtype;
  params.out_dtype = args.out.dtype;
  params.residual_out = Strided<2>(args.residual_out);
  params.out = Strided<2>(args.out);
  return params;
}

RmsNormBwdParams lower(const RmsNormBwdArgs& args, const Context& context) {
  const Checks check(kBwd, context.device());
  RmsNormBwdParams params{};
  params.fwd = lower_inputs(args, check, context.device());
  const Shape shape{{"rows", params.fwd.rows}, {"dim", params.fwd.dim}};
  const auto dtypes = any_beside(params.fwd.dtype);
  check.input(args.dout, "dout", shape, dtypes);
  check.optional(args.dresidual_out, "dresidual_out", shape, dtypes);
  check.gradient(args.dx, "dx", shape, dtypes);
  check.gradient(args.dresidual, "dresidual", shape, dtypes);
  check.gradient_of(args.z, args.dz, "dz", shape, dtypes);
  check.gradient_of(args.weight, args.dweight, "dweight", {{"dim", params.fwd.dim}}, dtypes);

  params.dout_dtype = args.dout.dtype;
  params.dresidual_out_dtype = args.dresidual_out.dtype;
  params.dout = Strided<2>(args.dout);
  params.dresidual_out = Strided<2>(args.dresidual_out);
  params.dx = StridedGradient<2>(args.dx);
  params.dresidual = StridedGradient<2>(args.dresidual);
  params.dz = StridedGradient<2>(args.dz);
  params.dweight = StridedGradient<1>(args.dweight);
  return params;
}

// Only when it runs: the memory of arguments that ask for a size may be made up.
void check_overlap(const RmsNormFwdArgs& args, const Context& context) {
  const Checks check("rms_norm", context.device());
  check.same_or_disjoint(args.out, "out", args.x, "x");
  check.same_or_disjoint(args.residual_out, "residual_out", args.residual, "residual");
  for (const auto& [input, name] :
       {std::pair{&args.residual, "residual"}, {&args.z, "z"}, {&args.weight, "weight"}})
    check.disjoint(args.out, "out", *input, name);
  for (const auto& [input, name] :
       {std::pair{&args.x, "x"}, {&args.z, "z"}, {&args.weight, "weight"}, {&args.out, "out"}})
    check.disjoint(args.residual_out, "residual_out", *input, name);
}

void check_overlap(const RmsNormBwdArgs& args, const Context& context) {
  const Checks check(kBwd, context.device());
  const Named dx{args.dx.tensor, "dx"}, dresidual{args.dresidual.tensor, "dresidual"},
      dout{args.dout, "dout"}, dresidual_out{args.dresidual_out, "dresidual_out"};
  check.disjoint_gradients(
      {dx, dresidual, {args.dz.tensor, "dz"}, {args.dweight.tensor, "dweight"}},
      {{args.x, "x"}, {args.weight, "weight"}, {args.residual, "residual"}, {args.z, "z"}});
  const auto check_pair = [&](const Named& gradient, const Named& input) {
    check.same_or_disjoint(gradient.tensor, gradient.name, input.tensor, input.name);
  };
  check_pair(dx, dout);
  check_pair(dx, dresidual_out);
  check_pair(dresidual, dresidual_out);
  check.disjoint(dresidual.tensor, dresidual.name, dout.tensor, dout.name);
  for (const Named& input : {dout, dresidual_out}) {
    check.disjoint(args.dz.tensor, "dz", input.tensor, input.name);
    check.disjoint(args.dweight.tensor, "dweight", input.tensor, input.name);
  }
}

}  // namespace

size_t rms_norm_fwd_workspace_size(const RmsNormFwdArgs& args, const Context& context) {
  return kernel_table(context).rms_norm_fwd.workspace_size(lower(args, context), context);
}

void rms_norm_fwd(const RmsNormFwdArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  check_overlap(args, exec.context);
  launch("rms_norm", kernel_table(exec.context).rms_norm_fwd, params, exec);
}

size_t rms_norm_bwd_workspace_size(const RmsNormBwdArgs& args, const Context& context) {
  return kernel_table(context).rms_norm_bwd.workspace_size(lower(args, context), context);
}

void rms_norm_bwd(const RmsNormBwdArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  check_overlap(args, exec.context);
  launch(kBwd, kernel_table(exec.context).rms_norm_bwd, params, exec);
}

}  // namespace ssmcore
