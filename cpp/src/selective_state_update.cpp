#include "ssmcore/selective_state_update.h"

#include <algorithm>

#include "checks.h"
#include "kernels.h"

namespace ssmcore {
namespace {

constexpr const char* kOp = "selective_state_update";

// A step is a scan over a sequence of one, from `state` into `state`.
SelectiveScanFwdParams lower(const SelectiveStateUpdateArgs& args, const Context& context) {
  const Checks check(kOp, context.device());
  const bool per_head = args.x.rank == 3;
  check.rank(args.x, "x", per_head ? 3 : 2, per_head ? "(batch, nheads, headdim)" : "(batch, dim)");
  check.rank(args.A, "A", args.x.rank, per_head ? "(nheads, headdim, dstate)" : "(dim, dstate)");
  check.rank(args.state, "state", args.x.rank + 1,
             per_head ? "(slots, nheads, headdim, dstate)" : "(slots, dim, dstate)");
  const Dim batch{"batch", args.x.shape[0]};
  const Dim heads{per_head ? "nheads" : "dim", args.x.shape[1]};
  const Shape channels = per_head ? Shape{heads, {"headdim", args.x.shape[2]}} : Shape{heads};
  const Shape dstate{{"dstate", args.A.shape[channels.rank]}};
  const Dim slots{"slots", args.state_indices ? args.state.shape[0] : batch.size};
  const DType dtype = args.x.dtype;
  const bool is_complex = args.A.dtype == DType::complex64;

  check.input(args.x, "x", Shape{batch} + channels, kActivationTypes);
  check.input(args.dt, "dt", Shape{batch} + channels, {dtype});
  check.input(args.A, "A", channels + dstate, {DType::float32, DType::complex64});
  check.optional(args.D, "D", channels, {DType::float32});
  check.optional(args.z, "z", Shape{batch} + channels, {dtype});
  check.optional(args.dt_bias, "dt_bias", channels, {DType::float32});
  check.output(args.out, "out", Shape{batch} + channels, {dtype});
  check.output(args.state, "state", Shape{slots} + channels + dstate, {args.A.dtype});
  check.state_indices(args.state_indices, batch.size, slots.size);

  // The scan's form of B and C: (batch, ngroups, dstate, seqlen = 1), with pairs for complex A.
  const Shape pair = is_complex ? Shape{{"2", 2}} : Shape{};
  int64_t ngroups = 1;
  const auto coefficients = [&](const TensorView& tensor, const char* name) {
    const bool grouped = tensor.rank == 3 + pair.rank;
    const Dim groups{"ngroups", grouped ? tensor.shape[1] : 1};
    check.input(tensor, name, Shape{batch} + (grouped ? Shape{groups} : Shape{}) + dstate + pair,
                {dtype});
    check.divides(name, groups, heads);
    ngroups = std::max(ngroups, groups.size);
    const TensorView with_groups = grouped ? tensor : tensor.unsqueeze(1);
    return is_complex ? with_groups : with_groups.unsqueeze(3);
  };
  SelectiveScanFwdArgs scan;
  scan.B = coefficients(args.B, "B");
  scan.C = coefficients(args.C, "C");
  for (const TensorView* tensor : {&scan.B, &scan.C})
    check.require(tensor->shape[1] == 1 || tensor->shape[1] == ngroups, [&] {
      return "C has ngroups " + std::to_string(scan.C.shape[1]) + ", B has " +
             std::to_string(scan.B.shape[1]);
    });

  // Channels without heads are split into groups.
  const auto in_heads = [&](const TensorView& tensor, int dim) {
    return tensor && !per_head ? tensor.split(dim, ngroups) : tensor;
  };
  const auto one_step = [&](const TensorView& tensor) {
    return tensor ? in_heads(tensor, 1).unsqueeze(3) : tensor;
  };
  scan.u = one_step(args.x);
  scan.delta = one_step(args.dt);
  scan.z = one_step(args.z);
  scan.out = one_step(args.out);
  scan.A = in_heads(args.A, 0);
  scan.D = in_heads(args.D, 0);
  scan.delta_bias = in_heads(args.dt_bias, 0);
  scan.delta_softplus = args.dt_softplus;
  scan.initial_state = scan.last_state = in_heads(args.state, 1);
  scan.state_indices = args.state_indices;
  return make_scan_params(scan, ngroups);
}

// Only when it runs: the memory of arguments that ask for a size may be made up.
void check_overlap(const SelectiveStateUpdateArgs& args, const Context& context) {
  const Checks check(kOp, context.device());
  for (const auto& [input, name] : {std::pair{&args.x, "x"},
                                    {&args.dt, "dt"},
                                    {&args.A, "A"},
                                    {&args.B, "B"},
                                    {&args.C, "C"},
                                    {&args.D, "D"},
                                    {&args.z, "z"},
                                    {&args.dt_bias, "dt_bias"}}) {
    check.disjoint(args.out, "out", *input, name);
    check.disjoint(args.state, "state", *input, name);
  }
  check.disjoint(args.out, "out", args.state, "state");
}

}  // namespace

size_t selective_state_update_workspace_size(const SelectiveStateUpdateArgs& args,
                                             const Context& context) {
  return kernel_table(context).selective_scan_fwd.workspace_size(lower(args, context), context);
}

void selective_state_update(const SelectiveStateUpdateArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  check_overlap(args, exec.context);
  launch(kOp, kernel_table(exec.context).selective_scan_fwd, params, exec);
}

}  // namespace ssmcore
