#include "ssmcore/causal_conv1d.h"

#include "checks.h"
#include "kernels.h"

namespace ssmcore {
namespace {

// What a caller knows the operator and its states by.
struct Names {
  const char *op, *initial_state, *final_state;
};
constexpr Names kSequence{"causal_conv1d", "initial_state", "final_state"};
constexpr Names kUpdate{"causal_conv1d_update", "conv_state", "conv_state"};

CausalConv1dFwdParams lower(const CausalConv1dFwdArgs& args, const Context& context,
                            const Names& names) {
  const Checks check(names.op, context.device());
  check.rank(args.x, "x", 3, "(batch, dim, seqlen)");
  check.rank(args.weight, "weight", 2, "(dim, width)");
  const Dim batch{"batch", args.x.shape[0]}, dim{"dim", args.x.shape[1]},
      seqlen{"seqlen", args.x.shape[2]}, width{"width", args.weight.shape[1]};
  const DType dtype = args.x.dtype;

  check.input(args.x, "x", {batch, dim, seqlen}, kActivationTypes);
  check.input(args.weight, "weight", {dim, width}, {dtype, DType::float32});
  check.range("weight: width", width.size, kMinConvWidth, kMaxConvWidth);
  check.optional(args.bias, "bias", {dim}, {dtype, DType::float32});
  const bool packed = static_cast<bool>(args.cu_seqlens);
  const Dim rows{packed ? "sequences" : "batch",
                 packed ? check.cu_seqlens(args.cu_seqlens, batch.size, seqlen.size) : batch.size};
  check.optional(args.seq_idx, "seq_idx", {batch, seqlen}, {DType::int32});
  check.require(!args.seq_idx || !(packed || args.initial_state || args.final_state), [&] {
    return std::string("seq_idx excludes ") + (packed               ? "cu_seqlens"
                                               : args.initial_state ? names.initial_state
                                                                    : names.final_state);
  });
  check.output(args.out, "out", {batch, dim, seqlen}, {dtype});

  CausalConv1dFwdParams params{};
  const TensorView& any_state = args.initial_state ? args.initial_state : args.final_state;
  if (any_state) {
    const char* name = args.initial_state ? names.initial_state : names.final_state;
    check.rank(any_state, name, 3, "(slots, dim, state_len)");
    const Dim slots{"slots", args.state_indices ? any_state.shape[0] : rows.size},
        state_len{"state_len", any_state.shape[2]};
    check.require(state_len.size >= width.size - 1, [&] {
      return std::string(name) + " has state_len " + std::to_string(state_len.size) +
             ", expected at least width - 1 = " + std::to_string(width.size - 1);
    });
    check.optional(args.initial_state, names.initial_state, {slots, dim, state_len}, {dtype});
    if (args.final_state)
      check.output(args.final_state, names.final_state, {slots, dim, state_len}, {dtype});
    check.state_indices(args.state_indices, rows.size, slots.size);
    params.slots = slots.size;
    params.state_len = state_len.size;
  } else {
    check.state_indices(args.state_indices, rows.size, rows.size);
  }

  params.dtype = dtype;
  params.weight_dtype = args.weight.dtype;
  params.bias_dtype = args.bias.dtype;
  params.rows = rows.size;
  params.dim = dim.size;
  params.seqlen = seqlen.size;
  params.width = width.size;
  params.activation = args.activation;
  params.x = Strided<3>(args.x);
  params.out = Strided<3>(args.out);
  params.weight = Strided<2>(args.weight);
  params.bias = Strided<1>(args.bias);
  params.initial_state = Strided<3>(args.initial_state);
  params.final_state = Strided<3>(args.final_state);
  params.state_indices = Strided<1>(args.state_indices);
  params.cu_seqlens = Strided<1>(args.cu_seqlens);
  params.seq_idx = Strided<2>(args.seq_idx);
  return params;
}

// Only when it runs: the memory of arguments that ask for a size may be made up.
void check_overlap(const CausalConv1dFwdArgs& args, const Context& context, const Names& names) {
  const Checks check(names.op, context.device());
  check.disjoint(args.out, "out", args.initial_state, names.initial_state);
  check.disjoint(args.out, "out", args.final_state, names.final_state);
  for (const auto& [input, name] :
       {std::pair{&args.x, "x"}, {&args.weight, "weight"}, {&args.bias, "bias"}}) {
    check.disjoint(args.out, "out", *input, name);
    check.disjoint(args.final_state, names.final_state, *input, name);
  }
  check.same_or_disjoint(args.final_state, names.final_state, args.initial_state,
                         names.initial_state);
}

TensorView as_sequence(const TensorView& view) {
  return view.rank == 2 ? view.unsqueeze(2) : view;
}

CausalConv1dFwdArgs as_sequence(const CausalConv1dUpdateArgs& args, const Context& context) {
  const Checks check(kUpdate.op, context.device());
  check.require(args.x.rank == 2 || args.x.rank == 3, [&] {
    return "x" + (args.x ? " has shape " + args.x.shape_string() : " is missing") +
           ", expected (batch, dim) or (batch, dim, tokens)";
  });
  check.require(args.out.rank == args.x.rank, [&] {
    return "out has shape " + args.out.shape_string() + ", expected x's " + args.x.shape_string();
  });
  check.rank(args.conv_state, "conv_state", 3, "(slots, dim, state_len)");

  CausalConv1dFwdArgs sequence;
  sequence.x = as_sequence(args.x);
  sequence.weight = args.weight;
  sequence.bias = args.bias;
  sequence.activation = args.activation;
  sequence.initial_state = args.conv_state;
  sequence.final_state = args.conv_state;
  sequence.state_indices = args.state_indices;
  sequence.out = as_sequence(args.out);
  return sequence;
}

CausalConv1dFwdParams lower(const CausalConv1dUpdateArgs& args, const Context& context) {
  CausalConv1dFwdParams params = lower(as_sequence(args, context), context, kUpdate);
  const Checks check(kUpdate.op, context.device());
  check.optional(args.cache_seqlens, "cache_seqlens", {{"batch", params.rows}}, {DType::int32});
  params.cache_seqlens = Strided<1>(args.cache_seqlens);
  if (args.cache_seqlens && context.device().type == DeviceType::cpu)
    for (int64_t b = 0; b < params.rows; ++b)
      check.range(
          "an entry of cache_seqlens",
          integer_at(args.cache_seqlens.data, DType::int32, b * args.cache_seqlens.strides[0]), 0,
          INT32_MAX);
  return params;
}

}  // namespace

size_t causal_conv1d_fwd_workspace_size(const CausalConv1dFwdArgs& args, const Context& context) {
  return kernel_table(context).causal_conv1d_fwd.workspace_size(lower(args, context, kSequence),
                                                                context);
}

void causal_conv1d_fwd(const CausalConv1dFwdArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context, kSequence);
  check_overlap(args, exec.context, kSequence);
  launch(kSequence.op, kernel_table(exec.context).causal_conv1d_fwd, params, exec);
}

size_t causal_conv1d_update_workspace_size(const CausalConv1dUpdateArgs& args,
                                           const Context& context) {
  return kernel_table(context).causal_conv1d_fwd.workspace_size(lower(args, context), context);
}

void causal_conv1d_update(const CausalConv1dUpdateArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  check_overlap(as_sequence(args, exec.context), exec.context, kUpdate);
  launch(kUpdate.op, kernel_table(exec.context).causal_conv1d_fwd, params, exec);
}

}  // namespace ssmcore
