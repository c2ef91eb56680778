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
constexpr Names kBackward{"causal_conv1d_bwd", "initial_state", "dfinal_state"};

// What forward and backward read, but for the states.
template <typename Args>
CausalConv1dFwdParams lower_inputs(const Args& args, const Checks& check,
                                   std::initializer_list<DType> dtypes) {
  check.rank(args.x, "x", 3, "(batch, dim, seqlen)");
  check.rank(args.weight, "weight", 2, "(dim, width)");
  const Dim batch{"batch", args.x.shape[0]}, dim{"dim", args.x.shape[1]},
      seqlen{"seqlen", args.x.shape[2]}, width{"width", args.weight.shape[1]};
  const DType dtype = args.x.dtype;
  check.input(args.x, "x", {batch, dim, seqlen}, dtypes);
  check.input(args.weight, "weight", {dim, width}, {dtype, accumulator_of(dtype)});
  check.range("weight: width", width.size, kMinConvWidth, kMaxConvWidth);
  check.optional(args.bias, "bias", {dim}, {dtype, accumulator_of(dtype)});
  check.optional(args.seq_idx, "seq_idx", {batch, seqlen}, {DType::int32});

  CausalConv1dFwdParams params{};
  params.dtype = dtype;
  params.weight_dtype = args.weight.dtype;
  params.bias_dtype = args.bias.dtype;
  params.rows =
      args.cu_seqlens ? check.cu_seqlens(args.cu_seqlens, batch.size, seqlen.size) : batch.size;
  params.dim = dim.size;
  params.seqlen = seqlen.size;
  params.width = width.size;
  params.activation = args.activation;
  params.x = Strided<3>(args.x);
  params.weight = Strided<2>(args.weight);
  params.bias = Strided<1>(args.bias);
  params.state_indices = Strided<1>(args.state_indices);
  params.cu_seqlens = Strided<1>(args.cu_seqlens);
  params.seq_idx = Strided<2>(args.seq_idx);
  return params;
}

// The shape of states, as `any` of them has it, and checks of what goes with them.
template <typename Args>
Shape lower_states(const Args& args, const Checks& check, const Named& any,
                   CausalConv1dFwdParams& params) {
  check.require(!args.seq_idx || !(args.cu_seqlens || any.tensor), [&] {
    return std::string("seq_idx excludes ") + (args.cu_seqlens ? "cu_seqlens" : any.name);
  });
  if (!any.tensor) {
    check.state_indices(args.state_indices, params.rows, params.rows);
    return {};
  }
  check.rank(any.tensor, any.name, 3, "(slots, dim, state_len)");
  params.slots = args.state_indices ? any.tensor.shape[0] : params.rows;
  params.state_len = any.tensor.shape[2];
  check.require(params.state_len >= params.width - 1, [&] {
    return std::string(any.name) + " has state_len " + std::to_string(params.state_len) +
           ", expected at least width - 1 = " + std::to_string(params.width - 1);
  });
  check.state_indices(args.state_indices, params.rows, params.slots);
  return {{"slots", params.slots}, {"dim", params.dim}, {"state_len", params.state_len}};
}

Shape sequences(const CausalConv1dFwdParams& params, const TensorView& x) {
  return {{"batch", x.shape[0]}, {"dim", params.dim}, {"seqlen", params.seqlen}};
}

CausalConv1dFwdParams lower(const CausalConv1dFwdArgs& args, const Context& context,
                            const Names& names) {
  const Checks check(names.op, context.device());
  CausalConv1dFwdParams params = lower_inputs(
      args, check, &names == &kUpdate ? kActivationTypes : activation_or_double(context.device()));
  const Named any_state = args.initial_state ? Named{args.initial_state, names.initial_state}
                                             : Named{args.final_state, names.final_state};
  const Shape states = lower_states(args, check, any_state, params);
  check.optional(args.initial_state, names.initial_state, states, {params.dtype});
  if (args.final_state) check.output(args.final_state, names.final_state, states, {params.dtype});
  check.output(args.out, "out", sequences(params, args.x), {params.dtype});
  params.initial_state = Strided<3>(args.initial_state);
  params.final_state = Strided<3>(args.final_state);
  params.out = Strided<3>(args.out);
  return params;
}

CausalConv1dBwdParams lower(const CausalConv1dBwdArgs& args, const Context& context) {
  const Checks check(kBackward.op, context.device());
  CausalConv1dBwdParams params{};
  CausalConv1dFwdParams& fwd = params.fwd;
  fwd = lower_inputs(args, check, activation_or_double(context.device()));
  const Named any_state = args.initial_state  ? Named{args.initial_state, kBackward.initial_state}
                          : args.dfinal_state ? Named{args.dfinal_state, kBackward.final_state}
                                              : Named{args.dinitial_state.tensor, "dinitial_state"};
  const Shape states = lower_states(args, check, any_state, fwd);
  check.optional(args.initial_state, kBackward.initial_state, states, {fwd.dtype});
  check.optional(args.dfinal_state, kBackward.final_state, states, {fwd.dtype});
  check.input(args.dout, "dout", sequences(fwd, args.x), {fwd.dtype});
  const DType accumulator = accumulator_of(fwd.dtype);
  check.gradient(args.dx, "dx", sequences(fwd, args.x), {fwd.dtype, accumulator});
  check.gradient(args.dweight, "dweight", {{"dim", fwd.dim}, {"width", fwd.width}},
                 {fwd.weight_dtype, accumulator});
  check.gradient_of(args.bias, args.dbias, "dbias", {{"dim", fwd.dim}},
                    {fwd.bias_dtype, accumulator});
  check.gradient(args.dinitial_state, "dinitial_state", states, {fwd.dtype, accumulator});
  fwd.initial_state = Strided<3>(args.initial_state);
  params.dout = Strided<3>(args.dout);
  params.dfinal_state = Strided<3>(args.dfinal_state);
  params.dx = StridedGradient<3>(args.dx);
  params.dweight = StridedGradient<2>(args.dweight);
  params.dbias = StridedGradient<1>(args.dbias);
  params.dinitial_state = StridedGradient<3>(args.dinitial_state);
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

size_t causal_conv1d_bwd_workspace_size(const CausalConv1dBwdArgs& args, const Context& context) {
  return kernel_table(context).causal_conv1d_bwd.workspace_size(lower(args, context), context);
}

void causal_conv1d_bwd(const CausalConv1dBwdArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  Checks(kBackward.op, exec.context.device())
      .disjoint_gradients({{args.dx.tensor, "dx"},
                           {args.dweight.tensor, "dweight"},
                           {args.dbias.tensor, "dbias"},
                           {args.dinitial_state.tensor, "dinitial_state"}},
                          {{args.x, "x"},
                           {args.weight, "weight"},
                           {args.bias, "bias"},
                           {args.initial_state, kBackward.initial_state},
                           {args.dout, "dout"},
                           {args.dfinal_state, kBackward.final_state}});
  launch(kBackward.op, kernel_table(exec.context).causal_conv1d_bwd, params, exec);
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
