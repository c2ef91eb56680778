#include "ssmcore/selective_scan.h"

#include "kernels.h"
#include "selective_scan_checks.h"

namespace ssmcore {
namespace {

SelectiveScanFwdParams lower(const SelectiveScanFwdArgs& args, const Context& context) {
  const Checks check("selective_scan", context.device());
  const ScanProblem is = check_scan_inputs(check, args);
  check.output(args.out, "out", is.sequences(), {is.dtype});
  const Shape states = is.states(args, args.initial_state ? args.initial_state : args.last_state);
  check.optional(args.initial_state, "initial_state", states, {is.coefficient});
  if (args.last_state) check.output(args.last_state, "last_state", states, {is.coefficient});
  check.state_indices(args.state_indices, is.rows.size, states.dims[0].size);
  if (args.chunk_states)
    check.output(args.chunk_states, "chunk_states", check_chunks(check, args, is),
                 {is.coefficient});
  if (args.delta_sum) check.output(args.delta_sum, "delta_sum", {is.rows, is.dim}, {is.parameter});
  return make_scan_params(split_heads(args, is.ngroups), is.ngroups);
}

// Only when it runs: the memory of arguments that ask for a size may be made up.
void check_overlap(const SelectiveScanFwdArgs& args, const Context& context) {
  const Checks check("selective_scan", context.device());
  const std::pair<const TensorView*, const char*> inputs[] = {
      {&args.u, "u"}, {&args.delta, "delta"}, {&args.A, "A"}, {&args.B, "B"},
      {&args.C, "C"}, {&args.D, "D"},         {&args.z, "z"}, {&args.delta_bias, "delta_bias"}};
  const std::pair<const TensorView*, const char*> outputs[] = {{&args.out, "out"},
                                                               {&args.last_state, "last_state"},
                                                               {&args.chunk_states, "chunk_states"},
                                                               {&args.delta_sum, "delta_sum"}};
  for (const auto& [output, name] : outputs) {
    for (const auto& [input, input_name] : inputs)
      check.disjoint(*output, name, *input, input_name);
    for (const auto& [other, other_name] : outputs)
      if (other != output) check.disjoint(*output, name, *other, other_name);
    if (output == &args.last_state)
      check.same_or_disjoint(*output, name, args.initial_state, "initial_state");
    else
      check.disjoint(*output, name, args.initial_state, "initial_state");
  }
}

}  // namespace

SelectiveScanFwdParams make_scan_params(const SelectiveScanFwdArgs& heads, int64_t ngroups) {
  SelectiveScanFwdParams params{};
  params.dtype = heads.u.dtype;
  params.complex = heads.A.dtype == DType::complex64;
  params.rows = heads.cu_seqlens ? heads.cu_seqlens.shape[0] - 1 : heads.u.shape[0];
  params.nheads = heads.u.shape[1];
  params.headdim = heads.u.shape[2];
  params.seqlen = heads.u.shape[3];
  params.dstate = heads.A.shape[2];
  params.ngroups = ngroups;
  params.slots = heads.initial_state ? heads.initial_state.shape[0]
                 : heads.last_state  ? heads.last_state.shape[0]
                                     : INT64_MAX;
  params.chunks = heads.chunk_states ? heads.chunk_states.shape[1] : 0;
  params.chunk_size = heads.chunk_size;
  params.delta_softplus = heads.delta_softplus;
  params.u = Strided<4>(heads.u);
  params.delta = Strided<4>(heads.delta);
  params.z = Strided<4>(heads.z);
  params.out = Strided<4>(heads.out);
  params.A = Strided<3>(heads.A);
  const auto lower_coefficients = [](const TensorView& tensor, Strided<3>& constant,
                                     Strided<4>& varying) {
    if (tensor.rank == 3)
      constant = Strided<3>(tensor);
    else
      varying = Strided<4>(tensor);
    // One group for all where the other of B and C has several.
    if (tensor.rank == 4 && tensor.shape[1] == 1) varying.stride[1] = 0;
  };
  lower_coefficients(heads.B, params.constant_B, params.B);
  lower_coefficients(heads.C, params.constant_C, params.C);
  params.D = Strided<2>(heads.D);
  params.delta_bias = Strided<2>(heads.delta_bias);
  params.initial_state = Strided<4>(heads.initial_state);
  params.last_state = Strided<4>(heads.last_state);
  params.chunk_states = Strided<5>(heads.chunk_states);
  params.delta_sum = Strided<3>(heads.delta_sum);
  params.state_indices = Strided<1>(heads.state_indices);
  params.cu_seqlens = Strided<1>(heads.cu_seqlens);
  return params;
}

size_t selective_scan_fwd_workspace_size(const SelectiveScanFwdArgs& args, const Context& context) {
  return kernel_table(context).selective_scan_fwd.workspace_size(lower(args, context), context);
}

void selective_scan_fwd(const SelectiveScanFwdArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  check_overlap(args, exec.context);
  launch("selective_scan", kernel_table(exec.context).selective_scan_fwd, params, exec);
}

}  // namespace ssmcore
