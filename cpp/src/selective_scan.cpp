#include "ssmcore/selective_scan.h"

#include "checks.h"
#include "kernels.h"

namespace ssmcore {
namespace {

// Checks B or C, in any of its three forms, and returns its number of groups (1 where constant).
int64_t check_time_varying(const Checks& check, const TensorView& tensor, const char* name,
                           const TensorView& u, int64_t dstate) {
  const Dim dim{"dim", u.shape[1]}, n{"dstate", dstate}, batch{"batch", u.shape[0]},
      seqlen{"seqlen", u.shape[2]};
  check.require(tensor.rank >= 2 && tensor.rank <= 4, [&] {
    return std::string(name) + (tensor ? " has shape " + tensor.shape_string() : " is missing") +
           ", expected (dim, dstate), (batch, dstate, seqlen) or (batch, ngroups, dstate, seqlen)";
  });
  if (tensor.rank == 2) {
    check.input(tensor, name, {dim, n}, {DType::float32});
    return 1;
  }
  if (tensor.rank == 3) {
    check.input(tensor, name, {batch, n, seqlen}, {u.dtype});
    return 1;
  }
  const int64_t ngroups = tensor.shape[1];
  check.input(tensor, name, {batch, {"ngroups", ngroups}, n, seqlen}, {u.dtype});
  check.require(ngroups > 0 && u.shape[1] % ngroups == 0, [&] {
    return std::string(name) + " has ngroups " + std::to_string(ngroups) +
           ", which does not divide dim " + std::to_string(u.shape[1]);
  });
  return ngroups;
}

void lower_time_varying(const TensorView& tensor, Strided<2>& constant, Strided<4>& varying) {
  if (tensor.rank == 2)
    constant = Strided<2>(tensor);
  else
    varying = Strided<4>(tensor.rank == 3 ? tensor.unsqueeze(1) : tensor);
}

SelectiveScanFwdParams lower(const SelectiveScanFwdArgs& args, const Context& context) {
  const Checks check("selective_scan", context.device());
  check.rank(args.u, "u", 3, "(batch, dim, seqlen)");
  check.rank(args.A, "A", 2, "(dim, dstate)");
  const Dim batch{"batch", args.u.shape[0]}, dim{"dim", args.u.shape[1]},
      seqlen{"seqlen", args.u.shape[2]}, dstate{"dstate", args.A.shape[1]};
  const DType dtype = args.u.dtype;

  check.input(args.u, "u", {batch, dim, seqlen}, kActivationTypes);
  check.input(args.delta, "delta", {batch, dim, seqlen}, {dtype});
  check.input(args.A, "A", {dim, dstate}, {DType::float32});
  const int64_t groups_B = check_time_varying(check, args.B, "B", args.u, dstate.size);
  const int64_t groups_C = check_time_varying(check, args.C, "C", args.u, dstate.size);
  check.optional(args.D, "D", {dim}, {DType::float32});
  check.optional(args.z, "z", {batch, dim, seqlen}, {dtype});
  check.optional(args.delta_bias, "delta_bias", {dim}, {DType::float32});
  check.output(args.out, "out", {batch, dim, seqlen}, {dtype});

  const TensorView& any_state = args.initial_state ? args.initial_state : args.last_state;
  const Dim slots{"slots", args.state_indices && any_state ? any_state.shape[0] : batch.size};
  check.optional(args.initial_state, "initial_state", {slots, dim, dstate}, {DType::float32});
  if (args.last_state)
    check.output(args.last_state, "last_state", {slots, dim, dstate}, {DType::float32});
  check.state_indices(args.state_indices, batch.size, slots.size);

  // One of B and C may have a single group for all channels while the other has several: giving it
  // a group stride of 0 makes the kernels see equal numbers.
  const int64_t ngroups = std::max(groups_B, groups_C);
  check.require(
      (groups_B == 1 || groups_B == ngroups) && (groups_C == 1 || groups_C == ngroups), [&] {
        return "C has ngroups " + std::to_string(groups_C) + ", B has " + std::to_string(groups_B);
      });

  SelectiveScanFwdParams params{};
  params.dtype = dtype;
  params.batch = batch.size;
  params.dim = dim.size;
  params.seqlen = seqlen.size;
  params.dstate = dstate.size;
  params.ngroups = ngroups;
  params.delta_softplus = args.delta_softplus;
  params.u = Strided<3>(args.u);
  params.delta = Strided<3>(args.delta);
  params.z = Strided<3>(args.z);
  params.out = Strided<3>(args.out);
  params.A = Strided<2>(args.A);
  lower_time_varying(args.B, params.constant_B, params.B);
  lower_time_varying(args.C, params.constant_C, params.C);
  if (groups_B == 1) params.B.stride[1] = 0;
  if (groups_C == 1) params.C.stride[1] = 0;
  params.D = Strided<1>(args.D);
  params.delta_bias = Strided<1>(args.delta_bias);
  params.initial_state = Strided<3>(args.initial_state);
  params.last_state = Strided<3>(args.last_state);
  params.state_indices = Strided<1>(args.state_indices);
  return params;
}

// Only when it runs: the memory of arguments that ask for a size may be made up.
void check_overlap(const SelectiveScanFwdArgs& args, const Context& context) {
  const Checks check("selective_scan", context.device());
  for (const auto& [input, name] : {std::pair{&args.u, "u"},
                                    {&args.delta, "delta"},
                                    {&args.A, "A"},
                                    {&args.B, "B"},
                                    {&args.C, "C"},
                                    {&args.D, "D"},
                                    {&args.z, "z"},
                                    {&args.delta_bias, "delta_bias"}}) {
    check.disjoint(args.out, "out", *input, name);
    check.disjoint(args.last_state, "last_state", *input, name);
  }
  check.disjoint(args.out, "out", args.initial_state, "initial_state");
  check.disjoint(args.out, "out", args.last_state, "last_state");
  check.same_or_disjoint(args.last_state, "last_state", args.initial_state, "initial_state");
}

}  // namespace

size_t selective_scan_fwd_workspace_size(const SelectiveScanFwdArgs& args, const Context& context) {
  return kernel_table(context).selective_scan_fwd.workspace_size(lower(args, context), context);
}

void selective_scan_fwd(const SelectiveScanFwdArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  check_overlap(args, exec.context);
  launch("selective_scan", kernel_table(exec.context).selective_scan_fwd, params, exec);
}

}  // namespace ssmcore
