// Checks and lowers the scan's backward.
#include <initializer_list>
#include <string>

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

// A gradient is shaped as its input, and there is none without one.
void check_gradient(const Checks& check, const Gradient& gradient, const char* name,
                    const TensorView& input, const char* input_name) {
  if (!gradient.tensor) return;
  check.require(static_cast<bool>(input), [&] {
    return std::string(name) + " is asked for, but " + input_name + " is missing";
  });
  check.require(gradient.tensor.rank == input.rank, [&] {
    return std::string(name) + " has shape " + gradient.tensor.shape_string() + ", expected " +
           input.shape_string() + ", as " + input_name;
  });
  Shape shape{};
  static constexpr const char* kDims[] = {"size 0", "size 1", "size 2", "size 3"};
  for (int i = 0; i < input.rank; ++i) shape = shape + Shape{{kDims[i], input.shape[i]}};
  check.output(gradient.tensor, name, shape, {input.dtype});
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
  check_gradient(check, args.du, "du", args.u, "u");
  check_gradient(check, args.ddelta, "ddelta", args.delta, "delta");
  check_gradient(check, args.dA, "dA", args.A, "A");
  check_gradient(check, args.dB, "dB", args.B, "B");
  check_gradient(check, args.dC, "dC", args.C, "C");
  check_gradient(check, args.dD, "dD", args.D, "D");
  check_gradient(check, args.dz, "dz", args.z, "z");
  check_gradient(check, args.ddelta_bias, "ddelta_bias", args.delta_bias, "delta_bias");
  if (args.dinitial_state.tensor)
    check.output(args.dinitial_state.tensor, "dinitial_state", states, {is.coefficient});

  const int64_t nheads = is.ngroups;
  SelectiveScanBwdParams params{};
  params.fwd = make_scan_params(split_heads(fwd, nheads), nheads);
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
  const Checks check(kOp, context.device());
  struct Named {
    const TensorView& tensor;
    const char* name;
  };
  const Named inputs[] = {{args.u, "u"},
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
                          {args.dlast_state, "dlast_state"}};
  const Named gradients[] = {{args.du.tensor, "du"},
                             {args.ddelta.tensor, "ddelta"},
                             {args.dA.tensor, "dA"},
                             {args.dB.tensor, "dB"},
                             {args.dC.tensor, "dC"},
                             {args.dD.tensor, "dD"},
                             {args.dz.tensor, "dz"},
                             {args.ddelta_bias.tensor, "ddelta_bias"},
                             {args.dinitial_state.tensor, "dinitial_state"}};
  for (const Named& gradient : gradients) {
    for (const Named& input : inputs)
      check.disjoint(gradient.tensor, gradient.name, input.tensor, input.name);
    for (const Named& other : gradients)
      if (&other != &gradient)
        check.disjoint(gradient.tensor, gradient.name, other.tensor, other.name);
  }
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
