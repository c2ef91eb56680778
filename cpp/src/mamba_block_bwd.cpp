#include <algorithm>
#include <string>
#include <tuple>

#include "checks.h"
#include "kernels.h"
#include "mamba_block_parts.h"
#include "scratch.h"
#include "ssmcore/causal_conv1d.h"
#include "ssmcore/linear.h"
#include "ssmcore/mamba_block_train.h"
#include "ssmcore/rms_norm.h"
#include "ssmcore/selective_scan.h"

namespace ssmcore {
namespace {

constexpr const char* kOp = "mamba_block_bwd";

// What is computed again, then the operators backward, their operands placed in the caller's
// tensors and the scratch.
struct Plan {
  bool has_norms = false, computes_u = false, computes_delta = false;
  CausalConv1dFwdArgs conv_fwd;
  RmsNormFwdArgs norms_fwd[3];  // of Δ, B and C
  LinearArgs dt_proj_fwd;

  LinearBwdArgs out_proj;
  SelectiveScanBwdArgs scan;
  ParameterProductParams A_log{};
  LinearBwdArgs dt_proj;
  RmsNormBwdArgs norms[3];
  LinearBwdArgs x_proj;
  CausalConv1dBwdArgs conv;
  LinearBwdArgs in_proj;

  Plan(const MambaBlockBwdArgs& args, const Context& context, Scratch& scratch);

  size_t largest_workspace(const Context& context) const {
    size_t largest = std::max({linear_bwd_workspace_size(out_proj, context),
                               selective_scan_bwd_workspace_size(scan, context),
                               linear_bwd_workspace_size(dt_proj, context),
                               linear_bwd_workspace_size(x_proj, context),
                               causal_conv1d_bwd_workspace_size(conv, context),
                               linear_bwd_workspace_size(in_proj, context)});
    if (computes_u)
      largest = std::max(largest, causal_conv1d_fwd_workspace_size(conv_fwd, context));
    if (computes_delta) largest = std::max(largest, linear_workspace_size(dt_proj_fwd, context));
    if (has_norms)
      for (int i = 0; i < 3; ++i)
        largest = std::max({largest, rms_norm_fwd_workspace_size(norms_fwd[i], context),
                            rms_norm_bwd_workspace_size(norms[i], context)});
    return largest;
  }
};

void check_states(const Checks& check, const MambaBlockBwdArgs& args, const MambaBlockSizes& is) {
  const Dim rows{"rows", is.rows}, steps{"width - 1", is.width.size - 1};
  const Shape conv{rows, is.dim, steps}, ssm{rows, is.dim, is.dstate};
  check.optional(args.initial_conv_state, "initial_conv_state", conv, {is.dtype});
  check.optional(args.dfinal_conv_state, "dfinal_conv_state", conv, {is.dtype});
  check.gradient_of(args.initial_conv_state, args.dinitial_conv_state, "dinitial_conv_state", conv,
                    {is.dtype});
  check.optional(args.initial_ssm_state, "initial_ssm_state", ssm, {is.parameter});
  check.optional(args.dlast_ssm_state, "dlast_ssm_state", ssm, {is.parameter});
  check.gradient_of(args.initial_ssm_state, args.dinitial_ssm_state, "dinitial_ssm_state", ssm,
                    {is.parameter});
}

void check_weight_gradients(const Checks& check, const MambaBlockWeights& weights,
                            const MambaBlockWeightGradients& gradients, const MambaBlockSizes& is) {
  const Shape dim{is.dim}, d_model{is.d_model}, two_dim{{"2 dim", 2 * is.dim.size}};
  const auto of = [&](const TensorView& weight, const Gradient& gradient, const char* name,
                      const Shape& shape) {
    check.gradient_of(weight, gradient, name, shape, {weight.dtype, is.parameter});
  };
  of(weights.in_proj.data, gradients.in_proj, "din_proj", two_dim + d_model);
  of(weights.in_proj_bias, gradients.in_proj_bias, "din_proj_bias", two_dim);
  of(weights.conv_weight, gradients.conv_weight, "dconv_weight", dim + Shape{is.width});
  of(weights.conv_bias, gradients.conv_bias, "dconv_bias", dim);
  of(weights.x_proj.data, gradients.x_proj, "dx_proj", Shape{is.delta_B_C()} + dim);
  of(weights.dt_proj.data, gradients.dt_proj, "ddt_proj", dim + Shape{is.dt_rank});
  of(weights.dt_bias, gradients.dt_bias, "ddt_bias", dim);
  of(weights.A, gradients.A, "dA", dim + Shape{is.dstate});
  of(weights.A, gradients.A_log, "dA_log", dim + Shape{is.dstate});
  check.require(!gradients.A.tensor || !gradients.A_log.tensor,
                [] { return std::string("dA and dA_log are both given, expected one of them"); });
  of(weights.D, gradients.D, "dD", dim);
  of(weights.out_proj.data, gradients.out_proj, "dout_proj", d_model + dim);
  of(weights.out_proj_bias, gradients.out_proj_bias, "dout_proj_bias", d_model);
}

Plan::Plan(const MambaBlockBwdArgs& args, const Context& context, Scratch& scratch) {
  const Checks check(kOp, context.device());
  const MambaBlockSizes is(check, args.weights, args.x, args.cu_seqlens);
  const MambaBlockWeights& weights = *args.weights;
  const MambaBlockWeightGradients& gradients = args.dweights;
  check_saved(check, args.saved, is, &Checks::input);
  check.input(args.dout, "dout", {is.batch, is.seqlen, is.d_model}, {is.dtype});
  check_contiguous(check, args.dout, "dout");
  check.gradient(args.dx, "dx", {is.batch, is.seqlen, is.d_model}, {is.dtype});
  if (args.dx.tensor) check_contiguous(check, args.dx.tensor, "dx");
  check_states(check, args, is);
  check_weight_gradients(check, weights, gradients, is);

  const int64_t dim = is.dim.size;
  const auto activation = [&](int64_t n) {
    return scratch.tensor(is.dtype, {is.batch.size, is.seqlen.size, n}, context.device());
  };
  has_norms = weights.dt_B_C_norm_eps > 0;
  computes_u = !args.saved.u;
  computes_delta = !args.saved.delta;
  const TensorView u = computes_u ? activation(dim) : args.saved.u;
  const TensorView delta = computes_delta ? activation(dim) : args.saved.delta;
  const TensorView& projected = args.saved.delta_B_C;
  const TensorView normed = has_norms ? activation(is.delta_B_C().size) : projected;
  const TensorView dxz = activation(2 * dim), du = activation(dim), ddelta = activation(dim);
  const TensorView dprojected = activation(is.delta_B_C().size);
  const TensorView x_before = args.saved.xz.slice(2, 0, dim), z = args.saved.xz.slice(2, dim, dim);
  const TensorView dx_before = dxz.slice(2, 0, dim), dz = dxz.slice(2, dim, dim);
  const TensorView dy = dx_before;  // the scan has read it before the convolution writes there
  const DeltaBC before(projected, is), after(normed, is), d(dprojected, is);

  conv_fwd = mamba_block_conv(x_before, u, weights);
  conv_fwd.initial_state = args.initial_conv_state;
  conv_fwd.cu_seqlens = args.cu_seqlens;
  dt_proj_fwd = {as_rows(after.delta), weights.dt_proj, {}, as_rows(delta)};

  out_proj = {as_rows(args.saved.y), weights.out_proj,   as_rows(args.dout),
              {as_rows(dy)},         gradients.out_proj, gradients.out_proj_bias};

  scan.u = channels_first(u);
  scan.delta = channels_first(delta);
  scan.A = weights.A;
  scan.B = channels_first(after.B);
  scan.C = channels_first(after.C);
  scan.D = weights.D;
  scan.z = channels_first(z);
  scan.delta_bias = weights.dt_bias;
  scan.delta_softplus = true;
  scan.cu_seqlens = args.cu_seqlens;
  scan.initial_state = args.initial_ssm_state;
  scan.chunk_states = args.saved.chunk_states;
  scan.chunk_size = kMambaBlockChunkSize;
  scan.dout = channels_first(dy);
  scan.dlast_state = args.dlast_ssm_state;
  scan.du = {channels_first(du)};
  scan.ddelta = {channels_first(ddelta)};
  scan.dA = gradients.A;
  if (gradients.A_log.tensor) {
    // Channels are contiguous in memory, as the model has them in A.
    const TensorView dA =
        scratch.tensor(is.parameter, {is.dstate.size, dim}, context.device()).transpose(0, 1);
    scan.dA = {dA};
    A_log = {is.parameter,          dim,
             is.dstate.size,        Strided<2>(dA),
             Strided<2>(weights.A), StridedGradient<2>(gradients.A_log)};
  }
  scan.dB = {channels_first(d.B)};
  scan.dC = {channels_first(d.C)};
  scan.dD = gradients.D;
  scan.dz = {channels_first(dz)};
  scan.ddelta_bias = gradients.dt_bias;
  scan.dinitial_state = args.dinitial_ssm_state;

  dt_proj = {as_rows(after.delta), weights.dt_proj,   as_rows(ddelta),
             {as_rows(d.delta)},   gradients.dt_proj, {}};

  for (const auto& [i, x, out, dx] : {std::tuple{0, &before.delta, &after.delta, &d.delta},
                                      {1, &before.B, &after.B, &d.B},
                                      {2, &before.C, &after.C, &d.C}}) {
    norms_fwd[i] = mamba_block_norm(*x, *out, weights.dt_B_C_norm_eps);
    norms[i].x = as_rows(*x);
    norms[i].eps = weights.dt_B_C_norm_eps;
    norms[i].dout = as_rows(*dx);
    norms[i].dx = {as_rows(*dx)};
  }

  x_proj = {as_rows(u),          weights.x_proj,   as_rows(dprojected),
            {as_rows(du), true}, gradients.x_proj, {}};

  conv.x = channels_first(x_before);
  conv.weight = weights.conv_weight;
  conv.bias = weights.conv_bias;
  conv.activation = Activation::silu;
  conv.initial_state = args.initial_conv_state;
  conv.cu_seqlens = args.cu_seqlens;
  conv.dout = channels_first(du);
  conv.dfinal_state = args.dfinal_conv_state;
  conv.dx = {channels_first(dx_before)};
  conv.dweight = gradients.conv_weight;
  conv.dbias = gradients.conv_bias;
  conv.dinitial_state = args.dinitial_conv_state;

  in_proj = {as_rows(args.x),   weights.in_proj,       as_rows(dxz), {},
             gradients.in_proj, gradients.in_proj_bias};
  if (args.dx.tensor) in_proj.dx = {as_rows(args.dx.tensor), args.dx.accumulate};
}

}  // namespace

size_t mamba_block_bwd_workspace_size(const MambaBlockBwdArgs& args, const Context& context) {
  Scratch scratch = Scratch::nowhere();
  const Plan plan(args, context, scratch);
  return scratch.used() + plan.largest_workspace(context);
}

void mamba_block_bwd(const MambaBlockBwdArgs& args, const Exec& exec) {
  // Placing operands touches no memory, so the plan that runs can also tell whether there is room.
  Scratch scratch = exec.workspace ? Scratch(exec.workspace) : Scratch::nowhere();
  const Plan plan(args, exec.context, scratch);
  Checks(kOp, exec.context.device())
      .workspace(exec, scratch.used() + plan.largest_workspace(exec.context));
  const Exec rest = scratch.rest(exec);
  if (plan.computes_u) causal_conv1d_fwd(plan.conv_fwd, rest);
  if (plan.has_norms)
    for (const RmsNormFwdArgs& norm : plan.norms_fwd) rms_norm_fwd(norm, rest);
  if (plan.computes_delta) linear(plan.dt_proj_fwd, rest);

  linear_bwd(plan.out_proj, rest);
  selective_scan_bwd(plan.scan, rest);
  if (plan.A_log.to) launch(kOp, kernel_table(exec.context).parameter_product, plan.A_log, rest);
  linear_bwd(plan.dt_proj, rest);
  if (plan.has_norms)
    for (const RmsNormBwdArgs& norm : plan.norms) rms_norm_bwd(norm, rest);
  linear_bwd(plan.x_proj, rest);
  causal_conv1d_bwd(plan.conv, rest);
  linear_bwd(plan.in_proj, rest);
}

}  // namespace ssmcore
