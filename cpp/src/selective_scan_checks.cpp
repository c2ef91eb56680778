#include "selective_scan_checks.h"

#include <algorithm>

#include "strided.h"

namespace ssmcore {
namespace {

ScanProblem problem_of(const SelectiveScanFwdArgs& args, const Checks& check) {
  check.rank(args.u, "u", 3, "(batch, dim, seqlen)");
  check.rank(args.A, "A", 2, "(dim, dstate)");
  ScanProblem problem{};
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
                           const ScanProblem& is) {
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

}  // namespace

Shape ScanProblem::states(const SelectiveScanFwdArgs& args, const TensorView& any_state) const {
  return {{"slots", args.state_indices && any_state ? any_state.shape[0] : rows.size}, dim, dstate};
}

ScanProblem check_scan_inputs(const Checks& check, const SelectiveScanFwdArgs& args) {
  ScanProblem is = problem_of(args, check);
  check.input(args.u, "u", is.sequences(), kScanTypes);
  check.input(args.delta, "delta", is.sequences(), {is.dtype});
  check.input(args.A, "A", {is.dim, is.dstate},
              is.dtype == DType::float64
                  ? std::initializer_list<DType>{DType::float64}
                  : std::initializer_list<DType>{DType::float32, DType::complex64});
  is.ngroups_B = check_coefficients(check, args.B, "B", is);
  is.ngroups_C = check_coefficients(check, args.C, "C", is);
  is.ngroups = std::max(is.ngroups_B, is.ngroups_C);
  check.require(std::min(is.ngroups_B, is.ngroups_C) == 1 || is.ngroups_B == is.ngroups_C, [&] {
    return "C has ngroups " + std::to_string(is.ngroups_C) + ", B has " +
           std::to_string(is.ngroups_B);
  });
  check.optional(args.D, "D", {is.dim}, {is.parameter});
  check.optional(args.z, "z", is.sequences(), {is.dtype});
  check.optional(args.delta_bias, "delta_bias", {is.dim}, {is.parameter});
  const bool packed = static_cast<bool>(args.cu_seqlens);
  is.rows = {
      packed ? "sequences" : "batch",
      packed ? check.cu_seqlens(args.cu_seqlens, is.batch.size, is.seqlen.size) : is.batch.size};
  return is;
}

Shape check_chunks(const Checks& check, const SelectiveScanFwdArgs& args, const ScanProblem& is) {
  check.require(args.chunk_size > 0, [&] {
    return "chunk_size is " + std::to_string(args.chunk_size) + ", expected at least 1";
  });
  const int64_t chunks = count_chunks(args, is.rows.size, is.seqlen.size);
  return {is.batch, {"chunks", chunks}, is.dim, is.dstate};
}

TensorView split_coefficients(const TensorView& tensor, int64_t nheads) {
  return tensor.rank == 2   ? tensor.split(0, nheads)
         : tensor.rank == 3 ? tensor.unsqueeze(1)
                            : tensor;
}

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
  for (TensorView* tensor : {&heads.B, &heads.C}) *tensor = split_coefficients(*tensor, nheads);
  return heads;
}

}  // namespace ssmcore
