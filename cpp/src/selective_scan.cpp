#include "ssmcore/selective_scan.h"

#include <algorithm>

#include "checks.h"
#include "kernels.h"

namespace ssmcore {
namespace {

// Sizes and types that the checks refer to.
struct Problem {
  Dim batch, dim, seqlen, dstate;
  DType dtype;        // of the activations
  DType parameter;    // of D, delta_bias and delta_sum
  DType coefficient;  // of A, constant B and C, and the states
  int64_t parts;      // numbers that make one of B or C: 2 where complex
};

Problem problem_of(const SelectiveScanFwdArgs& args, const Checks& check) {
  check.rank(args.u, "u", 3, "(batch, dim, seqlen)");
  check.rank(args.A, "A", 2, "(dim, dstate)");
  Problem problem;
  problem.batch = {"batch", args.u.shape[0]};
  problem.dim = {"dim", args.u.shape[1]};
  problem.seqlen = {"seqlen", args.u.shape[2]};
  problem.dstate = {"dstate", args.A.shape[1]};
  problem.dtype = args.u.dtype;
  const bool is_double = args.u.dtype == DType::float64;
  const bool is_complex = args.A.dtype == DType::complex64 && !is_double;
  problem.parameter = is_double ? DType::float64 : DType::float32;
  problem.coefficient = is_complex ? DType::complex64 : problem.parameter;
  problem.parts = is_complex ? 2 : 1;
  return problem;
}

// Checks B or C, in any of its three forms, and returns its number of groups (1 where constant).
int64_t check_coefficients(const Checks& check, const TensorView& tensor, const char* name,
                           const Problem& is) {
  const Dim steps{is.parts == 2 ? "2 seqlen" : "seqlen", is.parts * is.seqlen.size};
  check.require(tensor.rank >= 2 && tensor.rank <= 4, [&] {
    return std::string(name) + (tensor ? " has shape " + tensor.shape_string() : " is missing") +
           ", expected (dim, dstate), (batch, dstate, seqlen) or (batch, ngroups, dstate, seqlen)";
  });
  if (tensor.rank == 2) {
    check.input(tensor, name, {is.dim, is.dstate}, {is.coefficient});
    return 1;
  }
  if (tensor.rank == 3) {
    check.input(tensor, name, {is.batch, is.dstate, steps}, {is.dtype});
    return 1;
  }
  const Dim ngroups{"ngroups", tensor.shape[1]};
  check.input(tensor, name, {is.batch, ngroups, is.dstate, steps}, {is.dtype});
  check.divides(name, ngroups, is.dim);
  return ngroups.size;
}

// On a GPU what packed sequences take cannot be seen: the kernel fills what there is.
int64_t count_chunks(const SelectiveScanFwdArgs& args, int64_t rows, int64_t seqlen) {
  const auto chunks = [&](int64_t length) { return ceil_div(length, args.chunk_size); };
  if (!args.cu_seqlens) return chunks(seqlen);
  if (args.cu_seqlens.device.type != DeviceType::cpu && args.chunk_states.rank > 1)
    return args.chunk_states.shape[1];
  int64_t sum = 0;
  const int32_t* cu_seqlens = args.cu_seqlens.as<const int32_t>();
  const int64_t stride = args.cu_seqlens.strides[0];
  for (int64_t row = 0; row < rows; ++row)
    sum += chunks(cu_seqlens[(row + 1) * stride] - cu_seqlens[row * stride]);
  return sum;
}

void check_states(const Checks& check, const SelectiveScanFwdArgs& args, const Problem& is,
                  const Dim& rows) {
  const TensorView& any_state = args.initial_state ? args.initial_state : args.last_state;
  const Dim slots{"slots", args.state_indices && any_state ? any_state.shape[0] : rows.size};
  check.optional(args.initial_state, "initial_state", {slots, is.dim, is.dstate}, {is.coefficient});
  if (args.last_state)
    check.output(args.last_state, "last_state", {slots, is.dim, is.dstate}, {is.coefficient});
  check.state_indices(args.state_indices, rows.size, slots.size);
  if (args.chunk_states) {
    check.require(args.chunk_size > 0, [&] {
      return "chunk_size is " + std::to_string(args.chunk_size) + ", expected at least 1";
    });
    const Dim chunks{"chunks", count_chunks(args, rows.size, is.seqlen.size)};
    check.output(args.chunk_states, "chunk_states", {is.batch, chunks, is.dim, is.dstate},
                 {is.coefficient});
  }
  if (args.delta_sum) check.output(args.delta_sum, "delta_sum", {rows, is.dim}, {is.parameter});
}

// The same arguments with channels split into `nheads` heads.
SelectiveScanFwdArgs split_heads(const SelectiveScanFwdArgs& args, int64_t nheads) {
  SelectiveScanFwdArgs heads = args;
  const auto split = [&](TensorView& tensor, int dim) {
    if (tensor) tensor = tensor.split(dim, nheads);
  };
  for (TensorView* tensor : {&heads.u, &heads.delta, &heads.z, &heads.out, &heads.initial_state,
                             &heads.last_state, &heads.delta_sum})
    split(*tensor, 1);
  for (TensorView* tensor : {&heads.A, &heads.D, &heads.delta_bias}) split(*tensor, 0);
  split(heads.chunk_states, 2);
  for (TensorView* tensor : {&heads.B, &heads.C}) {
    if (tensor->rank == 2)
      split(*tensor, 0);
    else if (tensor->rank == 3)
      *tensor = tensor->unsqueeze(1);
  }
  return heads;
}

SelectiveScanFwdParams lower(const SelectiveScanFwdArgs& args, const Context& context) {
  const Checks check("selective_scan", context.device());
  const Problem is = problem_of(args, check);
  check.input(args.u, "u", {is.batch, is.dim, is.seqlen}, kScanTypes);
  check.input(args.delta, "delta", {is.batch, is.dim, is.seqlen}, {is.dtype});
  check.input(args.A, "A", {is.dim, is.dstate},
              is.dtype == DType::float64
                  ? std::initializer_list<DType>{DType::float64}
                  : std::initializer_list<DType>{DType::float32, DType::complex64});
  const int64_t groups_B = check_coefficients(check, args.B, "B", is);
  const int64_t groups_C = check_coefficients(check, args.C, "C", is);
  check.optional(args.D, "D", {is.dim}, {is.parameter});
  check.optional(args.z, "z", {is.batch, is.dim, is.seqlen}, {is.dtype});
  check.optional(args.delta_bias, "delta_bias", {is.dim}, {is.parameter});
  check.output(args.out, "out", {is.batch, is.dim, is.seqlen}, {is.dtype});
  const bool packed = static_cast<bool>(args.cu_seqlens);
  const Dim rows{
      packed ? "sequences" : "batch",
      packed ? check.cu_seqlens(args.cu_seqlens, is.batch.size, is.seqlen.size) : is.batch.size};
  check_states(check, args, is, rows);
  const int64_t ngroups = std::max(groups_B, groups_C);
  check.require(
      (groups_B == 1 || groups_B == ngroups) && (groups_C == 1 || groups_C == ngroups), [&] {
        return "C has ngroups " + std::to_string(groups_C) + ", B has " + std::to_string(groups_B);
      });
  return make_scan_params(split_heads(args, ngroups), ngroups);
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
                                     : 0;
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
