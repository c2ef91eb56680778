// Checks and lowers the scan's backward.
#include "kernels.h"
#include "selective_scan_checks.h"

namespace ssmcore {
namespace {

constexpr const char* kOp = "selective_scan_bwd";

// The forward's arguments without its outputs.
SelectiveScanFwdArgs forward_of(const SelectiveScanBwdArgs& args) {
  SelectiveScanFwdArgs fwd;
  fwd.u = args.u;
  fwd.delta = args.delta;
  fwd.A = args.A;
  fwd.B = args.B;
  fwd.C = args.C;
  fwd.D = args.D;
  fwd.z = args.z;
  fwd.delta_bias = args.delta_bias;
  fwd.delta_softplus = args.delta_softplus;
  fwd.cu_seqlens = args.cu_seqlens;
  fwd.initial_state = args.initial_state;
  fwd.state_indices = args.state_indices;
  fwd.chunk_states = args.chunk_states;
  fwd.chunk_size = args.chunk_size;
  return fwd;
}

// The shape of B or C, which is checked already.
Shape coefficient_shape(const TensorView& tensor, const ScanProblem& is) {
  const Dim steps{is.parts == 2 ? "2 seqlen" : "seqlen", is.parts * is.seqlen.size};
  if (tensor.rank == 2) return {is.dim, is.dstate};
  if (tensor.rank == 3) return {is.batch, is.dstate, steps};
  return {is.batch, {"ngroups", tensor.shape[1]}, is.dstate, steps};
}

SelectiveScanBwdParams lower(const SelectiveScanBwdArgs& args, const Context& context) {
  const Checks check(kOp, context.device());
  const SelectiveScanFwdArgs fwd = forward_of(args);
  const ScanProblem is = check_scan_inputs(check, fwd);
  check.input(args.dout, "dout", is.sequences(), {is.dtype});
  const TensorView& any_state = args.initial_state ? args.initial_state
                                : args.dlast_state ? args.dlast_state
                                                   : args.dinitial_state.tensor;
  const Shape states = is.states(fwd, any_state);
  check.optional(args.initial_state, "initial_state", states, {is.coefficient});
  check.optional(args.dlast_state, "dlast_state", states, {is.coefficient});
  check.state_indices(args.state_indices, is.rows.size, states.dims[0].size);
  if (args.chunk_states)
    check.input(args.chunk_states, "chunk_states", check_chunks(check, fwd, is), {is.coefficient});
  check.gradient(args.du, "du", is.sequences(), {is.dtype});
  check.gradient(args.ddelta, "ddelta", is.sequences(), {is.dtype});
  check.gradient(args.dA, "dA", {is.dim, is.dstate}, {is.coefficient});
  check.gradient(args.dB, "dB", coefficient_shape(args.B, is), {args.B.dtype});
  check.gradient(args.dC, "dC", coefficient_shape(args.C, is), {args.C.dtype});
  check.gradient_of(args.D, args.dD, "dD", {is.dim}, {is.parameter});
  check.gradient_of(args.z, args.dz, "dz", is.sequences(), {is.dtype});
  check.gradient_of(args.delta_bias, args.ddelta_bias, "ddelta_bias", {is.dim}, {is.parameter});
  check.gradient(args.dinitial_state, "dinitial_state", states, {is.coefficient});

  const int64_t nheads = is.ngroups;
  SelectiveScanBwdParams params{};
  params.fwd = make_scan_params(split_heads(fwd, nheads), nheads);
  if (any_state) params.fwd.slots = any_state.shape[0];
  params.ngroups_B = is.ngroups_B;
  params.ngroups_C = is.ngroups_C;
  const auto split = [&](const Gradient& gradient, int dim) {
    const TensorView& tensor = gradient.tensor;
    return Gradient{tensor ? tensor.split(dim, nheads) : tensor, gradient.accumulate};
  };
  params.dout = Strided<4>(args.dout.split(1, nheads));
  params.dlast_state = Strided<4>(split({args.dlast_state}, 1).tensor);
  params.du = StridedGradient<4>(split(args.du, 1));
  params.ddelta = StridedGradient<4>(split(args.ddelta, 1));
  params.dz = StridedGradient<4>(split(args.dz, 1));
  params.dA = StridedGradient<3>(split(args.dA, 0));
  params.dD = StridedGradient<2>(split(args.dD, 0));
  params.ddelta_bias = StridedGradient<2>(split(args.ddelta_bias, 0));
  params.dinitial_state = StridedGradient<4>(split(args.dinitial_state, 1));
  const auto lower_coefficients = [&](const Gradient& gradient, StridedGradient<3>& constant,
                                      StridedGradient<4>& varying) {
    const Gradient heads{split_coefficients(gradient.tensor, nheads), gradient.accumulate};
    if (heads.tensor.rank == 3)
      constant = StridedGradient<3>(heads);
    else
      varying = StridedGradient<4>(heads);
  };
  lower_coefficients(args.dB, params.constant_dB, params.dB);
  lower_coefficients(args.dC, params.constant_dC, params.dC);
  return params;
}

// Only when it runs: the memory of arguments that ask for a size may be made up.
void check_overlap(const SelectiveScanBwdArgs& args, const Context& context) {
  Checks(kOp, context.device())
      .disjoint_gradients({{args.du.tensor, "du"},
                           {args.ddelta.tensor, "ddelta"},
                           {args.dA.tensor, "dA"},
                           {args.dB.tensor, "dB"},
                           {args.dC.tensor, "dC"},
                           {args.dD.tensor, "dD"},
                           {args.dz.tensor, "dz"},
                           {args.ddelta_bias.tensor, "ddelta_bias"},
                           {args.dinitial_state.tensor, "dinitial_state"}},
                          {{args.u, "u"},
                           {args.delta, "delta"},
                           {args.A, "A"},
                           {args.B, "B"},
                           {args.C, "C"},
                           {args.D, "D"},
                           {args.z, "z"},
                           {args.delta_bias, "delta_bias"},
                           {args.initial_state, "initial_state"},
                           {args.chunk_states, "chunk_states"},
                           {args.dout, "dout"},
                           {args.dlast_state, "dlast_state"}});
}

}  // namespace

size_t selective_scan_bwd_workspace_size(const SelectiveScanBwdArgs& args, const Context& context) {
  return kernel_table(context).selective_scan_bwd.workspace_size(lower(args, context), context);
}

void selective_scan_bwd(const SelectiveScanBwdArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  check_overlap(args, exec.context);
  launch(kOp, kernel_table(exec.context).selective_scan_bwd, params, exec);
}

}  // namespace ssmcore
