#include "ssmcore/mamba_block.h"

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "mamba_block_parts.h"
#include "scratch.h"
#include "ssmcore/causal_conv1d.h"
#include "ssmcore/linear.h"
#include "ssmcore/mamba_block_train.h"
#include "ssmcore/rms_norm.h"
#include "ssmcore/selective_scan.h"

namespace ssmcore {
namespace {

// A state before and after the pass, which may be the same memory, and what the caller calls it.
struct State {
  TensorView before, after;
  const char *before_name, *after_name;
};

// One forward pass. What is absent in `saved` is not kept.
struct Pass {
  const char* op;
  const MambaBlockWeights* weights;
  TensorView x, out;
  State conv_state, ssm_state;
  TensorView state_indices, cu_seqlens;
  MambaBlockSaved saved;
};

// The block's operators in order, their operands placed in the caller's tensors and the scratch.
struct Plan {
  LinearArgs in_proj;
  CausalConv1dFwdArgs conv;
  LinearArgs x_proj;
  bool has_norms = false;
  RmsNormFwdArgs norms[3];  // of Δ, B and C
  LinearArgs dt_proj;
  SelectiveScanFwdArgs scan;
  LinearArgs out_proj;

  Plan(const Pass& pass, const Context& context, Scratch& scratch);

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

Plan::Plan(const Pass& pass, const Context& context, Scratch& scratch) {
  const Checks check(pass.op, context.device());
  const MambaBlockSizes is(check, pass.weights, pass.x, pass.cu_seqlens);
  const MambaBlockWeights& weights = *pass.weights;
  check.output(pass.out, "out", {is.batch, is.seqlen, is.d_model}, {is.dtype});
  check_contiguous(check, pass.out, "out");
  const Dim steps{"width - 1", is.width.size - 1};
  for (const auto& [state, size, dtype] : {std::tuple{&pass.conv_state, steps, is.dtype},
                                           std::tuple{&pass.ssm_state, is.dstate, is.parameter}})
    for (const auto& [tensor, name] :
         {std::pair{&state->before, state->before_name}, {&state->after, state->after_name}}) {
      if (!*tensor) continue;
      const Dim slots{"slots", pass.state_indices ? tensor->shape[0] : is.rows};
      if (tensor == &state->after)
        check.output(*tensor, name, {slots, is.dim, size}, {dtype});
      else
        check.input(*tensor, name, {slots, is.dim, size}, {dtype});
      check.state_indices(pass.state_indices, is.rows, slots.size);
    }

  const auto place = [&](const TensorView& kept, int64_t n) {
    return kept ? kept
                : scratch.tensor(is.dtype, {is.batch.size, is.seqlen.size, n}, context.device());
  };
  const int64_t dim = is.dim.size;
  const TensorView xz = place(pass.saved.xz, 2 * dim);
  const TensorView u = place(pass.saved.u, dim), delta = place(pass.saved.delta, dim);
  const TensorView projected = place(pass.saved.delta_B_C, is.delta_B_C().size);
  const TensorView x_before = xz.slice(2, 0, dim), z = xz.slice(2, dim, dim);
  // Nobody needs x any longer once the convolution has read it, unless it is kept.
  const TensorView y = pass.saved.xz ? place(pass.saved.y, dim) : x_before;
  has_norms = weights.dt_B_C_norm_eps > 0;
  const bool in_place = !has_norms || !pass.saved.delta_B_C;
  const TensorView normed = in_place ? projected : place({}, is.delta_B_C().size);

  in_proj = {as_rows(pass.x), weights.in_proj, weights.in_proj_bias, as_rows(xz)};

  conv = mamba_block_conv(x_before, u, weights);
  conv.initial_state = pass.conv_state.before;
  conv.final_state = pass.conv_state.after;
  conv.state_indices = pass.state_indices;
  conv.cu_seqlens = pass.cu_seqlens;

  x_proj = {as_rows(u), weights.x_proj, {}, as_rows(projected)};
  const DeltaBC before(projected, is), after(normed, is);
  norms[0] = mamba_block_norm(before.delta, after.delta, weights.dt_B_C_norm_eps);
  norms[1] = mamba_block_norm(before.B, after.B, weights.dt_B_C_norm_eps);
  norms[2] = mamba_block_norm(before.C, after.C, weights.dt_B_C_norm_eps);
  dt_proj = {as_rows(after.delta), weights.dt_proj, {}, as_rows(delta)};

  scan.u = channels_first(u);
  scan.delta = channels_first(delta);
  scan.A = weights.A;
  scan.B = channels_first(after.B);
  scan.C = channels_first(after.C);
  scan.D = weights.D;
  scan.z = channels_first(z);
  scan.delta_bias = weights.dt_bias;
  scan.delta_softplus = true;
  scan.initial_state = pass.ssm_state.before;
  scan.last_state = pass.ssm_state.after;
  scan.state_indices = pass.state_indices;
  scan.cu_seqlens = pass.cu_seqlens;
  scan.chunk_states = pass.saved.chunk_states;
  scan.chunk_size = kMambaBlockChunkSize;
  scan.out = channels_first(y);

  out_proj = {as_rows(y), weights.out_proj, weights.out_proj_bias, as_rows(pass.out)};
}

Pass inference(const MambaBlockFwdArgs& args) {
  Pass pass;
  pass.op = "mamba_block";
  pass.weights = args.weights;
  pass.x = args.x;
  pass.out = args.out;
  pass.conv_state = {args.conv_state, args.conv_state, "conv_state", "conv_state"};
  pass.ssm_state = {args.ssm_state, args.ssm_state, "ssm_state", "ssm_state"};
  pass.state_indices = args.state_indices;
  pass.cu_seqlens = args.cu_seqlens;
  return pass;
}

Pass training(const MambaBlockTrainFwdArgs& args, const Context& context) {
  Pass pass;
  pass.op = "mamba_block_train_fwd";
  pass.weights = args.weights;
  pass.x = args.x;
  pass.out = args.out;
  pass.conv_state = {args.initial_conv_state, args.final_conv_state, "initial_conv_state",
                     "final_conv_state"};
  pass.ssm_state = {args.initial_ssm_state, args.last_ssm_state, "initial_ssm_state",
                    "last_ssm_state"};
  pass.cu_seqlens = args.cu_seqlens;
  pass.saved = args.saved;
  const Checks check(pass.op, context.device());
  const MambaBlockSizes is(check, args.weights, args.x, args.cu_seqlens);
  check_saved(check, args.saved, is, &Checks::output);
  return pass;
}

size_t workspace_size(const Pass& pass, const Context& context) {
  Scratch scratch = Scratch::nowhere();
  const Plan plan(pass, context, scratch);
  return scratch.used() + plan.largest_workspace(context);
}

void run(const Pass& pass, const Exec& exec) {
  // Placing operands touches no memory, so the plan that runs can also tell whether there is room.
  Scratch scratch = exec.workspace ? Scratch(exec.workspace) : Scratch::nowhere();
  const Plan plan(pass, exec.context, scratch);
  Checks(pass.op, exec.context.device())
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

}  // namespace

size_t mamba_block_fwd_workspace_size(const MambaBlockFwdArgs& args, const Context& context) {
  return workspace_size(inference(args), context);
}

void mamba_block_fwd(const MambaBlockFwdArgs& args, const Exec& exec) {
  run(inference(args), exec);
}

size_t mamba_block_train_fwd_workspace_size(const MambaBlockTrainFwdArgs& args,
                                            const Context& context) {
  return workspace_size(training(args, context), context);
}

void mamba_block_train_fwd(const MambaBlockTrainFwdArgs& args, const Exec& exec) {
  run(training(args, exec.context), exec);
}

}  // namespace ssmcore
