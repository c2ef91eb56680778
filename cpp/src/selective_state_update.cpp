#include "ssmcore/selective_state_update.h"

#include "checks.h"
#include "ssmcore/selective_scan.h"

namespace ssmcore {
namespace {

TensorView with_one_step(const TensorView& view) {
  return view ? view.unsqueeze(view.rank) : view;
}

// A step is a scan over a sequence of one, from `state` into `state`.
SelectiveScanFwdArgs as_scan(const SelectiveStateUpdateArgs& args, const Context& context) {
  const Checks check("selective_state_update", context.device());
  check.rank(args.x, "x", 2, "(batch, dim)");
  check.rank(args.A, "A", 2, "(dim, dstate)");
  const Dim batch{"batch", args.x.shape[0]}, dim{"dim", args.x.shape[1]},
      dstate{"dstate", args.A.shape[1]};
  const DType dtype = args.x.dtype;

  check.input(args.x, "x", {batch, dim}, kActivationTypes);
  check.input(args.dt, "dt", {batch, dim}, {dtype});
  check.input(args.A, "A", {dim, dstate}, {DType::float32});
  for (const auto& [tensor, name] : {std::pair{&args.B, "B"}, {&args.C, "C"}}) {
    if (tensor->rank == 3) {
      const Dim ngroups{"ngroups", tensor->shape[1]};
      check.input(*tensor, name, {batch, ngroups, dstate}, {dtype});
      check.require(ngroups.size > 0 && dim.size % ngroups.size == 0, [&, name = name] {
        return std::string(name) + " has ngroups " + std::to_string(ngroups.size) +
               ", which does not divide dim " + std::to_string(dim.size);
      });
    } else {
      check.input(*tensor, name, {batch, dstate}, {dtype});
    }
  }
  check.optional(args.D, "D", {dim}, {DType::float32});
  check.optional(args.z, "z", {batch, dim}, {dtype});
  check.optional(args.dt_bias, "dt_bias", {dim}, {DType::float32});
  check.output(args.out, "out", {batch, dim}, {dtype});
  check.rank(args.state, "state", 3, "(slots, dim, dstate)");
  const Dim slots{"slots", args.state_indices ? args.state.shape[0] : batch.size};
  check.output(args.state, "state", {slots, dim, dstate}, {DType::float32});
  check.state_indices(args.state_indices, batch.size, slots.size);

  SelectiveScanFwdArgs scan;
  scan.u = with_one_step(args.x);
  scan.delta = with_one_step(args.dt);
  scan.A = args.A;
  scan.B = with_one_step(args.B);
  scan.C = with_one_step(args.C);
  scan.D = args.D;
  scan.z = with_one_step(args.z);
  scan.delta_bias = args.dt_bias;
  scan.delta_softplus = args.dt_softplus;
  scan.initial_state = args.state;
  scan.last_state = args.state;
  scan.state_indices = args.state_indices;
  scan.out = with_one_step(args.out);
  return scan;
}

}  // namespace

size_t selective_state_update_workspace_size(const SelectiveStateUpdateArgs& args,
                                             const Context& context) {
  return selective_scan_fwd_workspace_size(as_scan(args, context), context);
}

void selective_state_update(const SelectiveStateUpdateArgs& args, const Exec& exec) {
  selective_scan_fwd(as_scan(args, exec.context), exec);
}

}  // namespace ssmcore
