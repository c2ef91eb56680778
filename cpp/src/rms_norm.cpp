#include "ssmcore/rms_norm.h"

#include "checks.h"
#include "kernels.h"

namespace ssmcore {
namespace {

RmsNormFwdParams lower(const RmsNormFwdArgs& args, const Context& context) {
  const Checks check("rms_norm", context.device());
  check.rank(args.x, "x", 2, "(rows, dim)");
  const Dim rows{"rows", args.x.shape[0]}, dim{"dim", args.x.shape[1]};
  check.input(args.x, "x", {rows, dim}, kActivationTypes);
  check.optional(args.weight, "weight", {dim}, kActivationTypes);
  check.optional(args.residual, "residual", {rows, dim}, kActivationTypes);
  if (args.residual_out)
    check.output(args.residual_out, "residual_out", {rows, dim}, kActivationTypes);
  check.optional(args.z, "z", {rows, dim}, kActivationTypes);
  check.output(args.out, "out", {rows, dim}, kActivationTypes);
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
  params.residual_out_dtype = args.residual_out.dtype;
  params.out_dtype = args.out.dtype;
  params.rows = rows.size;
  params.dim = dim.size;
  params.group_size = group_size;
  params.norm_before_gate = args.norm_before_gate;
  params.eps = args.eps;
  params.x = Strided<2>(args.x);
  params.residual = Strided<2>(args.residual);
  params.residual_out = Strided<2>(args.residual_out);
  params.z_dtype = args.z.dtype;
  params.z = Strided<2>(args.z);
  params.out = Strided<2>(args.out);
  params.weight = Strided<1>(args.weight);
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

}  // namespace

size_t rms_norm_fwd_workspace_size(const RmsNormFwdArgs& args, const Context& context) {
  return kernel_table(context).rms_norm_fwd.workspace_size(lower(args, context), context);
}

void rms_norm_fwd(const RmsNormFwdArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  check_overlap(args, exec.context);
  launch("rms_norm", kernel_table(exec.context).rms_norm_fwd, params, exec);
}

}  // namespace ssmcore
