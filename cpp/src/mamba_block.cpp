#include "ssmcore/mamba_block.h"

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "scratch.h"
#include "ssmcore/causal_conv1d.h"
#include "ssmcore/linear.h"
#include "ssmcore/rms_norm.h"
#include "ssmcore/selective_scan.h"

namespace ssmcore {
namespace {

// The block's operators in order, their operands placed in the caller's tensors and the scratch.
struct Plan {
  LinearArgs in_proj;
  CausalConv1dFwdArgs conv;
  LinearArgs x_proj;
  bool has_norms = false;
  RmsNormFwdArgs norms[3];  // of Δ, B and C, in place
  LinearArgs dt_proj;
  SelectiveScanFwdArgs scan;
  LinearArgs out_proj;

  Plan(const MambaBlockFwdArgs& args, const Context& context, Scratch& scratch);

  size_t largest_workspace(const Context& context) const {
    size_t largest = std::max(
        {linear_workspace_size(in_proj, context), causal_conv1d_fwd_workspace_size(conv, context),
         linear_workspace_size(x_proj, context), linear_workspace_size(dt_proj, context),
         selective_scan_fwd_workspace_size(scan, context),
         linear_workspace_size(out_proj, context)});
    if (has_norms)
      for (const RmsNormFwdArgs& norm : norms)
        largest = std::max(largest, rms_norm_fwd_workspace_size(norm, context));
    return largest;
  }
};

// (batch, seqlen, n), contiguous or a slice along n of such, as (batch · seqlen, n).
TensorView as_rows(const TensorView& tensor) {
  TensorView rows = tensor.select(0, 0);
  rows.shape[0] = tensor.shape[0] * tensor.shape[1];
  return rows;
}

// Token-major (batch, seqlen, n) as the operators' (batch, n, seqlen).
TensorView channels_first(const TensorView& tensor) {
  return tensor.transpose(1, 2);
}

Plan::Plan(const MambaBlockFwdArgs& args, const Context& context, Scratch& scratch) {
  const Checks check("mamba_block", context.device());
  check.require(args.weights != nullptr, [] { return std::string("weights are missing"); });
  const MambaBlockWeights& weights = *args.weights;
  check.rank(args.x, "x", 3, "(batch, seqlen, d_model)");
  check.rank(weights.A, "A", 2, "(dim, dstate)");
  check.rank(weights.dt_proj.data, "dt_proj", 2, "(dim, dt_rank)");
  const Dim batch{"batch", args.x.shape[0]}, seqlen{"seqlen", args.x.shape[1]},
      d_model{"d_model", args.x.shape[2]}, dim{"dim", weights.A.shape[0]},
      dstate{"dstate", weights.A.shape[1]}, dt_rank{"dt_rank", weights.dt_proj.cols()};
  const DType dtype = args.x.dtype;
  check.input(args.x, "x", {batch, seqlen, d_model}, kActivationTypes);
  check.output(args.out, "out", {batch, seqlen, d_model}, {dtype});
  for (const auto& [tensor, name] : {std::pair{&args.x, "x"}, {&args.out, "out"}})
    check.require(tensor->is_contiguous(),
                  [name = name] { return std::string(name) + " is not contiguous"; });
  check.input(weights.in_proj.data, "in_proj", {{"2 dim", 2 * dim.size}, d_model},
              kActivationTypes);
  check.input(weights.x_proj.data, "x_proj",
              {{"dt_rank + 2 dstate", dt_rank.size + 2 * dstate.size}, dim}, kActivationTypes);
  check.input(weights.dt_proj.data, "dt_proj", {dim, dt_rank}, kActivationTypes);
  check.input(weights.out_proj.data, "out_proj", {d_model, dim}, kActivationTypes);
  check.optional(weights.in_proj_bias, "in_proj_bias", {{"2 dim", 2 * dim.size}}, kActivationTypes);
  check.optional(weights.out_proj_bias, "out_proj_bias", {d_model}, kActivationTypes);
  check.input(weights.A, "A", {dim, dstate}, {DType::float32});
  check.optional(weights.D, "D", {dim}, {DType::float32});
  check.optional(weights.dt_bias, "dt_bias", {dim}, {DType::float32});
  check.rank(weights.conv_weight, "conv_weight", 2, "(dim, width)");
  const Dim width{"width", weights.conv_weight.shape[1]};
  check.range("conv_weight: width", width.size, kMinConvWidth, kMaxConvWidth);
  check.input(weights.conv_weight, "conv_weight", {dim, width}, {dtype, DType::float32});
  check.optional(weights.conv_bias, "conv_bias", {dim}, {dtype, DType::float32});
  check.require(weights.dt_B_C_norm_eps >= 0, [&] {
    return "dt_B_C_norm_eps is " + std::to_string(weights.dt_B_C_norm_eps) +
           ", expected at least 0";
  });
  const int64_t rows =
      args.cu_seqlens ? check.cu_seqlens(args.cu_seqlens, batch.size, seqlen.size) : batch.size;
  for (const auto& [state, name, steps, state_dtype] :
       {std::tuple{&args.conv_state, "conv_state", Dim{"width - 1", width.size - 1}, dtype},
        std::tuple{&args.ssm_state, "ssm_state", dstate, DType::float32}}) {
    if (!*state) continue;
    const Dim slots{"slots", args.state_indices ? state->shape[0] : rows};
    check.output(*state, name, {slots, dim, steps}, {state_dtype});
    check.state_indices(args.state_indices, rows, slots.size);
  }

  const auto activation = [&](int64_t n) {
    return scratch.tensor(dtype, {batch.size, seqlen.size, n}, context.device());
  };
  const TensorView xz = activation(2 * dim.size);
  const TensorView x = activation(dim.size), delta = activation(dim.size);
  const TensorView delta_B_C = activation(dt_rank.size + 2 * dstate.size);
  const TensorView x_before = xz.slice(2, 0, dim.size), z = xz.slice(2, dim.size, dim.size);
  const TensorView y = x_before;  // its memory is free once the convolution has read it

  in_proj = {as_rows(args.x), weights.in_proj, weights.in_proj_bias, as_rows(xz)};

  conv.x = channels_first(x_before);
  conv.weight = weights.conv_weight;
  conv.bias = weights.conv_bias;
  conv.activation = Activation::silu;
  conv.initial_state = conv.final_state = args.conv_state;
  conv.state_indices = args.state_indices;
  conv.cu_seqlens = args.cu_seqlens;
  conv.out = channels_first(x);

  x_proj = {as_rows(x), weights.x_proj, {}, as_rows(delta_B_C)};
  const TensorView low_rank_delta = delta_B_C.slice(2, 0, dt_rank.size);
  const TensorView B = delta_B_C.slice(2, dt_rank.size, dstate.size);
  const TensorView C = delta_B_C.slice(2, dt_rank.size + dstate.size, dstate.size);
  has_norms = weights.dt_B_C_norm_eps > 0;
  for (const auto& [norm, tensor] :
       {std::pair{&norms[0], &low_rank_delta}, {&norms[1], &B}, {&norms[2], &C}}) {
    norm->x = norm->out = as_rows(*tensor);
    norm->eps = weights.dt_B_C_norm_eps;
  }
  dt_proj = {as_rows(low_rank_delta), weights.dt_proj, {}, as_rows(delta)};

  scan.u = channels_first(x);
  scan.delta = channels_first(delta);
  scan.A = weights.A;
  scan.B = channels_first(B);
  scan.C = channels_first(C);
  scan.D = weights.D;
  scan.z = channels_first(z);
  scan.delta_bias = weights.dt_bias;
  scan.delta_softplus = true;
  scan.initial_state = scan.last_state = args.ssm_state;
  scan.state_indices = args.state_indices;
  scan.cu_seqlens = args.cu_seqlens;
  scan.out = channels_first(y);

  out_proj = {as_rows(y), weights.out_proj, weights.out_proj_bias, as_rows(args.out)};
}

}  // namespace

size_t mamba_block_fwd_workspace_size(const MambaBlockFwdArgs& args, const Context& context) {
  Scratch scratch = Scratch::nowhere();
  const Plan plan(args, context, scratch);
  return scratch.used() + plan.largest_workspace(context);
}

void mamba_block_fwd(const MambaBlockFwdArgs& args, const Exec& exec) {
  // Placing operands touches no memory, so the plan that runs can also tell whether there is room.
  Scratch scratch = exec.workspace ? Scratch(exec.workspace) : Scratch::nowhere();
  const Plan plan(args, exec.context, scratch);
  Checks("mamba_block", exec.context.device())
      .workspace(exec, scratch.used() + plan.largest_workspace(exec.context));
  const Exec rest = scratch.rest(exec);
  linear(plan.in_proj, rest);
  causal_conv1d_fwd(plan.conv, rest);
  linear(plan.x_proj, rest);
  if (plan.has_norms)
    for (const RmsNormFwdArgs& norm : plan.norms) rms_norm_fwd(norm, rest);
  linear(plan.dt_proj, rest);
  selective_scan_fwd(plan.scan, rest);
  linear(plan.out_proj, rest);
}

}  // namespace ssmcore
