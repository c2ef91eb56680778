// The C interface: operators. Each is its arguments, field by field, and a line in the table.
#include "c_api_operator.h"
#include "ssmcore/adamw.h"
#include "ssmcore/c_api.h"
#include "ssmcore/causal_conv1d.h"
#include "ssmcore/cross_entropy.h"
#include "ssmcore/embedding.h"
#include "ssmcore/linear.h"
#include "ssmcore/rms_norm.h"
#include "ssmcore/sample.h"
#include "ssmcore/selective_scan.h"
#include "ssmcore/selective_state_update.h"

namespace ssmcore::c_api {
namespace {

SelectiveScanFwdArgs lower(const ssmcore_selective_scan_fwd_args& c, const TensorReader& tensor) {
  SelectiveScanFwdArgs args;
  args.u = tensor(c.u, "u");
  args.delta = tensor(c.delta, "delta");
  args.A = tensor(c.A, "A");
  args.B = tensor(c.B, "B");
  args.C = tensor(c.C, "C");
  args.D = tensor(c.D, "D");
  args.z = tensor(c.z, "z");
  args.delta_bias = tensor(c.delta_bias, "delta_bias");
  args.delta_softplus = c.delta_softplus != 0;
  args.cu_seqlens = tensor(c.cu_seqlens, "cu_seqlens");
  args.initial_state = tensor(c.initial_state, "initial_state");
  args.last_state = tensor(c.last_state, "last_state");
  args.state_indices = tensor(c.state_indices, "state_indices");
  args.chunk_states = tensor(c.chunk_states, "chunk_states");
  args.chunk_size = c.chunk_size;
  args.delta_sum = tensor(c.delta_sum, "delta_sum");
  args.out = tensor(c.out, "out");
  return args;
}

SelectiveScanBwdArgs lower(const ssmcore_selective_scan_bwd_args& c, const TensorReader& tensor) {
  SelectiveScanBwdArgs args;
  args.u = tensor(c.u, "u");
  args.delta = tensor(c.delta, "delta");
  args.A = tensor(c.A, "A");
  args.B = tensor(c.B, "B");
  args.C = tensor(c.C, "C");
  args.D = tensor(c.D, "D");
  args.z = tensor(c.z, "z");
  args.delta_bias = tensor(c.delta_bias, "delta_bias");
  args.delta_softplus = c.delta_softplus != 0;
  args.cu_seqlens = tensor(c.cu_seqlens, "cu_seqlens");
  args.initial_state = tensor(c.initial_state, "initial_state");
  args.state_indices = tensor(c.state_indices, "state_indices");
  args.chunk_states = tensor(c.chunk_states, "chunk_states");
  args.chunk_size = c.chunk_size;
  args.dout = tensor(c.dout, "dout");
  args.dlast_state = tensor(c.dlast_state, "dlast_state");
  args.du = tensor(c.du, "du");
  args.ddelta = tensor(c.ddelta, "ddelta");
  args.dA = tensor(c.dA, "dA");
  args.dB = tensor(c.dB, "dB");
  args.dC = tensor(c.dC, "dC");
  args.dD = tensor(c.dD, "dD");
  args.dz = tensor(c.dz, "dz");
  args.ddelta_bias = tensor(c.ddelta_bias, "ddelta_bias");
  args.dinitial_state = tensor(c.dinitial_state, "dinitial_state");
  return args;
}

SelectiveStateUpdateArgs lower(const ssmcore_selective_state_update_args& c,
                               const TensorReader& tensor) {
  SelectiveStateUpdateArgs args;
  args.state = tensor(c.state, "state");
  args.x = tensor(c.x, "x");
  args.dt = tensor(c.dt, "dt");
  args.A = tensor(c.A, "A");
  args.B = tensor(c.B, "B");
  args.C = tensor(c.C, "C");
  args.D = tensor(c.D, "D");
  args.z = tensor(c.z, "z");
  args.dt_bias = tensor(c.dt_bias, "dt_bias");
  args.dt_softplus = c.dt_softplus != 0;
  args.state_indices = tensor(c.state_indices, "state_indices");
  args.out = tensor(c.out, "out");
  return args;
}

Activation to_activation(const char* op, int32_t activation) {
  if (activation == SSMCORE_ACTIVATION_NONE) return Activation::none;
  if (activation == SSMCORE_ACTIVATION_SILU) return Activation::silu;
  throw Error(ErrorCode::invalid_argument, std::string(op) + ": activation is " +
                                               std::to_string(activation) +
                                               ", expected 0 (none) or 1 (SiLU)");
}

CausalConv1dFwdArgs lower(const ssmcore_causal_conv1d_fwd_args& c, const TensorReader& tensor) {
  CausalConv1dFwdArgs args;
  args.x = tensor(c.x, "x");
  args.weight = tensor(c.weight, "weight");
  args.bias = tensor(c.bias, "bias");
  args.activation = to_activation(tensor.op(), c.activation);
  args.initial_state = tensor(c.initial_state, "initial_state");
  args.final_state = tensor(c.final_state, "final_state");
  args.state_indices = tensor(c.state_indices, "state_indices");
  args.cu_seqlens = tensor(c.cu_seqlens, "cu_seqlens");
  args.seq_idx = tensor(c.seq_idx, "seq_idx");
  args.out = tensor(c.out, "out");
  return args;
}

CausalConv1dBwdArgs lower(const ssmcore_causal_conv1d_bwd_args& c, const TensorReader& tensor) {
  CausalConv1dBwdArgs args;
  args.x = tensor(c.x, "x");
  args.weight = tensor(c.weight, "weight");
  args.bias = tensor(c.bias, "bias");
  args.activation = to_activation(tensor.op(), c.activation);
  args.initial_state = tensor(c.initial_state, "initial_state");
  args.state_indices = tensor(c.state_indices, "state_indices");
  args.cu_seqlens = tensor(c.cu_seqlens, "cu_seqlens");
  args.seq_idx = tensor(c.seq_idx, "seq_idx");
  args.dout = tensor(c.dout, "dout");
  args.dfinal_state = tensor(c.dfinal_state, "dfinal_state");
  args.dx = tensor(c.dx, "dx");
  args.dweight = tensor(c.dweight, "dweight");
  args.dbias = tensor(c.dbias, "dbias");
  args.dinitial_state = tensor(c.dinitial_state, "dinitial_state");
  return args;
}

CausalConv1dUpdateArgs lower(const ssmcore_causal_conv1d_update_args& c,
                             const TensorReader& tensor) {
  CausalConv1dUpdateArgs args;
  args.x = tensor(c.x, "x");
  args.conv_state = tensor(c.conv_state, "conv_state");
  args.cache_seqlens = tensor(c.cache_seqlens, "cache_seqlens");
  args.weight = tensor(c.weight, "weight");
  args.bias = tensor(c.bias, "bias");
  args.activation = to_activation(tensor.op(), c.activation);
  args.state_indices = tensor(c.state_indices, "state_indices");
  args.out = tensor(c.out, "out");
  return args;
}

RmsNormFwdArgs lower(const ssmcore_rms_norm_fwd_args& c, const TensorReader& tensor) {
  RmsNormFwdArgs args;
  args.x = tensor(c.x, "x");
  args.weight = tensor(c.weight, "weight");
  args.residual = tensor(c.residual, "residual");
  args.residual_out = tensor(c.residual_out, "residual_out");
  args.z = tensor(c.z, "z");
  args.out = tensor(c.out, "out");
  args.group_size = c.group_size;
  args.norm_before_gate = c.norm_before_gate != 0;
  if (c.eps != 0) args.eps = c.eps;
  return args;
}

RmsNormBwdArgs lower(const ssmcore_rms_norm_bwd_args& c, const TensorReader& tensor) {
  RmsNormBwdArgs args;
  args.x = tensor(c.x, "x");
  args.weight = tensor(c.weight, "weight");
  args.residual = tensor(c.residual, "residual");
  args.z = tensor(c.z, "z");
  args.group_size = c.group_size;
  args.norm_before_gate = c.norm_before_gate != 0;
  if (c.eps != 0) args.eps = c.eps;
  args.dout = tensor(c.dout, "dout");
  args.dresidual_out = tensor(c.dresidual_out, "dresidual_out");
  args.dx = tensor(c.dx, "dx");
  args.dresidual = tensor(c.dresidual, "dresidual");
  args.dz = tensor(c.dz, "dz");
  args.dweight = tensor(c.dweight, "dweight");
  return args;
}

LinearArgs lower(const ssmcore_linear_args& c, const TensorReader& tensor) {
  LinearArgs args;
  args.x = tensor(c.x, "x");
  args.weight = tensor(c.weight, "weight");
  args.bias = tensor(c.bias, "bias");
  args.out = tensor(c.out, "out");
  return args;
}

LinearBwdArgs lower(const ssmcore_linear_bwd_args& c, const TensorReader& tensor) {
  LinearBwdArgs args;
  args.x = tensor(c.x, "x");
  args.weight = tensor(c.weight, "weight");
  args.dout = tensor(c.dout, "dout");
  args.dx = tensor(c.dx, "dx");
  args.dweight = tensor(c.dweight, "dweight");
  args.dbias = tensor(c.dbias, "dbias");
  return args;
}

EmbeddingArgs lower(const ssmcore_embedding_args& c, const TensorReader& tensor) {
  EmbeddingArgs args;
  args.token_ids = tensor(c.token_ids, "token_ids");
  args.weight = tensor(c.weight, "weight");
  args.out = tensor(c.out, "out");
  return args;
}

size_t embedding_workspace_size(const EmbeddingArgs&, const Context&) {
  return 0;
}

EmbeddingBwdArgs lower(const ssmcore_embedding_bwd_args& c, const TensorReader& tensor) {
  EmbeddingBwdArgs args;
  args.token_ids = tensor(c.token_ids, "token_ids");
  args.dout = tensor(c.dout, "dout");
  args.dweight = tensor(c.dweight, "dweight");
  return args;
}

CrossEntropyFwdArgs lower(const ssmcore_cross_entropy_fwd_args& c, const TensorReader& tensor) {
  CrossEntropyFwdArgs args;
  args.logits = tensor(c.logits, "logits");
  args.targets = tensor(c.targets, "targets");
  if (c.ignore_index != 0) args.ignore_index = c.ignore_index;
  args.loss = tensor(c.loss, "loss");
  args.mean_loss = tensor(c.mean_loss, "mean_loss");
  args.lse = tensor(c.lse, "lse");
  return args;
}

CrossEntropyBwdArgs lower(const ssmcore_cross_entropy_bwd_args& c, const TensorReader& tensor) {
  CrossEntropyBwdArgs args;
  args.logits = tensor(c.logits, "logits");
  args.targets = tensor(c.targets, "targets");
  if (c.ignore_index != 0) args.ignore_index = c.ignore_index;
  args.lse = tensor(c.lse, "lse");
  args.dloss = tensor(c.dloss, "dloss");
  args.dmean_loss = tensor(c.dmean_loss, "dmean_loss");
  args.dlogits = tensor(c.dlogits, "dlogits");
  return args;
}

SumOfSquaresArgs lower(const ssmcore_sum_of_squares_args& c, const TensorReader& tensor) {
  return {tensor(c.x, "x"), tensor(c.out, "out")};
}

size_t adamw_workspace_size(const AdamWArgs&, const Context&) {
  return 0;
}

AdamWArgs lower(const ssmcore_adamw_args& c, const TensorReader& tensor) {
  AdamWArgs args;
  args.parameter = tensor(c.parameter, "parameter");
  args.master = tensor(c.master, "master");
  args.gradient = tensor(c.gradient, "gradient");
  args.exp_avg = tensor(c.exp_avg, "exp_avg");
  args.exp_avg_sq = tensor(c.exp_avg_sq, "exp_avg_sq");
  args.sum_of_squares = tensor(c.sum_of_squares, "sum_of_squares");
  args.max_norm = c.max_norm;
  args.step = c.step;
  if (c.lr != 0) args.lr = c.lr;
  if (c.beta1 != 0) args.beta1 = c.beta1;
  if (c.beta2 != 0) args.beta2 = c.beta2;
  if (c.eps != 0) args.eps = c.eps;
  args.weight_decay = c.weight_decay;
  return args;
}

SampleArgs lower(const ssmcore_sample_args& c, const TensorReader& tensor) {
  SampleArgs args;
  args.logits = tensor(c.logits, "logits");
  args.history = tensor(c.history, "history");
  args.repetition_penalty = tensor(c.repetition_penalty, "repetition_penalty");
  args.temperature = tensor(c.temperature, "temperature");
  args.top_k = tensor(c.top_k, "top_k");
  args.top_p = tensor(c.top_p, "top_p");
  args.min_p = tensor(c.min_p, "min_p");
  args.seed = tensor(c.seed, "seed");
  args.position = tensor(c.position, "position");
  args.out = tensor(c.out, "out");
  return args;
}

}  // namespace
}  // namespace ssmcore::c_api

using namespace ssmcore;
using namespace ssmcore::c_api;

SSMCORE_DEFINE_OPERATOR(selective_scan_fwd, "selective_scan")
SSMCORE_DEFINE_OPERATOR(selective_scan_bwd, "selective_scan_bwd")
SSMCORE_DEFINE_OPERATOR(selective_state_update, "selective_state_update")
SSMCORE_DEFINE_OPERATOR(causal_conv1d_fwd, "causal_conv1d")
SSMCORE_DEFINE_OPERATOR(causal_conv1d_bwd, "causal_conv1d_bwd")
SSMCORE_DEFINE_OPERATOR(causal_conv1d_update, "causal_conv1d_update")
SSMCORE_DEFINE_OPERATOR(rms_norm_fwd, "rms_norm")
SSMCORE_DEFINE_OPERATOR(rms_norm_bwd, "rms_norm_bwd")
SSMCORE_DEFINE_OPERATOR(linear, "linear")
SSMCORE_DEFINE_OPERATOR(linear_bwd, "linear_bwd")
SSMCORE_DEFINE_OPERATOR(embedding, "embedding")
SSMCORE_DEFINE_OPERATOR(embedding_bwd, "embedding_bwd")
SSMCORE_DEFINE_OPERATOR(cross_entropy_fwd, "cross_entropy")
SSMCORE_DEFINE_OPERATOR(cross_entropy_bwd, "cross_entropy_bwd")
SSMCORE_DEFINE_OPERATOR(sum_of_squares, "sum_of_squares")
SSMCORE_DEFINE_OPERATOR(adamw, "adamw")
SSMCORE_DEFINE_OPERATOR(sample, "sample")
