#include "mamba_block_parts.h"

#include <string>

namespace ssmcore {

MambaBlockSizes::MambaBlockSizes(const Checks& check, const MambaBlockWeights* given,
                                 const TensorView& x, const TensorView& cu_seqlens) {
  check.require(given != nullptr, [] { return std::string("weights are missing"); });
  const MambaBlockWeights& weights = *given;
  check.rank(x, "x", 3, "(batch, seqlen, d_model)");
  check.rank(weights.A, "A", 2, "(dim, dstate)");
  check.rank(weights.dt_proj.data, "dt_proj", 2, "(dim, dt_rank)");
  batch = {"batch", x.shape[0]};
  seqlen = {"seqlen", x.shape[1]};
  d_model = {"d_model", x.shape[2]};
  dim = {"dim", weights.A.shape[0]};
  dstate = {"dstate", weights.A.shape[1]};
  dt_rank = {"dt_rank", weights.dt_proj.cols()};
  dtype = x.dtype;
  parameter = accumulator_of(dtype);
  const auto projection_types = any_beside(dtype);
  check.input(x, "x", {batch, seqlen, d_model}, activation_or_double(x.device));
  check_contiguous(check, x, "x");
  check.input(weights.in_proj.data, "in_proj", {{"2 dim", 2 * dim.size}, d_model},
              projection_types);
  check.input(weights.x_proj.data, "x_proj", {delta_B_C(), dim}, projection_types);
  check.input(weights.dt_proj.data, "dt_proj", {dim, dt_rank}, projection_types);
  check.input(weights.out_proj.data, "out_proj", {d_model, dim}, projection_types);
  check.optional(weights.in_proj_bias, "in_proj_bias", {{"2 dim", 2 * dim.size}}, projection_types);
  check.optional(weights.out_proj_bias, "out_proj_bias", {d_model}, projection_types);
  check.input(weights.A, "A", {dim, dstate}, {parameter});
  check.optional(weights.D, "D", {dim}, {parameter});
  check.optional(weights.dt_bias, "dt_bias", {dim}, {parameter});
  check.rank(weights.conv_weight, "conv_weight", 2, "(dim, width)");
  width = {"width", weights.conv_weight.shape[1]};
  check.range("conv_weight: width", width.size, kMinConvWidth, kMaxConvWidth);
  check.input(weights.conv_weight, "conv_weight", {dim, width}, {dtype, parameter});
  check.optional(weights.conv_bias, "conv_bias", {dim}, {dtype, parameter});
  check.require(weights.dt_B_C_norm_eps >= 0, [&] {
    return "dt_B_C_norm_eps is " + std::to_string(weights.dt_B_C_norm_eps) +
           ", expected at least 0";
  });
  rows = cu_seqlens ? check.cu_seqlens(cu_seqlens, batch.size, seqlen.size) : batch.size;
}

void check_contiguous(const Checks& check, const TensorView& tensor, const char* name) {
  check.require(tensor.is_contiguous(), [&] { return std::string(name) + " is not contiguous"; });
}

void check_saved(const Checks& check, const MambaBlockSaved& saved, const MambaBlockSizes& is,
                 decltype(&Checks::input) input_or_output) {
  const auto activation = [&](const TensorView& tensor, const char* name, const Dim& n) {
    (check.*input_or_output)(tensor, name, {is.batch, is.seqlen, n}, {is.dtype});
    check_contiguous(check, tensor, name);
  };
  activation(saved.xz, "saved xz", {"2 dim", 2 * is.dim.size});
  activation(saved.delta_B_C, "saved delta_B_C", is.delta_B_C());
  activation(saved.y, "saved y", is.dim);
  if (saved.u) activation(saved.u, "saved u", is.dim);
  if (saved.delta) activation(saved.delta, "saved delta", is.dim);
  check.rank(saved.chunk_states, "saved chunk_states", 4, "(batch, chunks, dim, dstate)");
  const Dim chunks{"chunks", saved.chunk_states.shape[1]};  // which the scan checks
  (check.*input_or_output)(saved.chunk_states, "saved chunk_states",
                           {is.batch, chunks, is.dim, is.dstate}, {is.parameter});
}

CausalConv1dFwdArgs mamba_block_conv(const TensorView& x, const TensorView& u,
                                     const MambaBlockWeights& weights) {
  CausalConv1dFwdArgs conv;
  conv.x = channels_first(x);
  conv.weight = weights.conv_weight;
  conv.bias = weights.conv_bias;
  conv.activation = Activation::silu;
  conv.out = channels_first(u);
  return conv;
}

RmsNormFwdArgs mamba_block_norm(const TensorView& x, const TensorView& out, float eps) {
  RmsNormFwdArgs norm;
  norm.x = as_rows(x);
  norm.out = as_rows(out);
  norm.eps = eps;
  return norm;
}

}  // namespace ssmcore
