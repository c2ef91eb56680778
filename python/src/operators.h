// Operators that are called in more than one way, taking the fields of their C++ arguments by name
// from a call: of Python (call.h), or of XLA (jax/xla_call.h).
#pragma once

#include "ssmcore/causal_conv1d.h"
#include "ssmcore/mamba_block.h"
#include "ssmcore/mamba_block_train.h"
#include "ssmcore/selective_scan.h"

namespace ssmcore {

template <typename Call>
void call_selective_scan(Call& call) {
  SelectiveScanFwdArgs args;
  args.u = call.input("u");
  args.delta = call.input("delta");
  args.A = call.input("A");
  args.B = call.input("B");
  args.C = call.input("C");
  args.D = call.input("D");
  args.z = call.input("z");
  args.delta_bias = call.input("delta_bias");
  args.delta_softplus = call.template value<bool>("delta_softplus");
  args.cu_seqlens = call.input("cu_seqlens");
  args.initial_state = call.input("initial_state");
  args.last_state = call.output("last_state");
  args.chunk_states = call.output("chunk_states");
  args.chunk_size = call.template value<int64_t>("chunk_size");
  args.delta_sum = call.output("delta_sum");
  args.out = call.output("out");
  call.run(selective_scan_fwd_workspace_size, selective_scan_fwd, args);
}

template <typename Call>
void call_selective_scan_bwd(Call& call) {
  SelectiveScanBwdArgs args;
  args.u = call.input("u");
  args.delta = call.input("delta");
  args.A = call.input("A");
  args.B = call.input("B");
  args.C = call.input("C");
  args.D = call.input("D");
  args.z = call.input("z");
  args.delta_bias = call.input("delta_bias");
  args.delta_softplus = call.template value<bool>("delta_softplus");
  args.cu_seqlens = call.input("cu_seqlens");
  args.initial_state = call.input("initial_state");
  args.state_indices = call.input("state_indices");
  args.chunk_states = call.input("chunk_states");
  args.chunk_size = call.template value<int64_t>("chunk_size");
  args.dout = call.input("dout");
  args.dlast_state = call.input("dlast_state");
  args.du = call.gradient("du");
  args.ddelta = call.gradient("ddelta");
  args.dA = call.gradient("dA");
  args.dB = call.gradient("dB");
  args.dC = call.gradient("dC");
  args.dD = call.gradient("dD");
  args.dz = call.gradient("dz");
  args.ddelta_bias = call.gradient("ddelta_bias");
  args.dinitial_state = call.gradient("dinitial_state");
  call.run(selective_scan_bwd_workspace_size, selective_scan_bwd, args);
}

template <typename Call>
void call_causal_conv1d(Call& call) {
  CausalConv1dFwdArgs args;
  args.x = call.input("x");
  args.weight = call.input("weight");
  args.bias = call.input("bias");
  args.activation = call.activation();
  args.initial_state = call.input("initial_state");
  args.final_state = call.output("final_state");
  args.cu_seqlens = call.input("cu_seqlens");
  args.seq_idx = call.input("seq_idx");
  args.out = call.output("out");
  call.run(causal_conv1d_fwd_workspace_size, causal_conv1d_fwd, args);
}

template <typename Call>
void call_causal_conv1d_bwd(Call& call) {
  CausalConv1dBwdArgs args;
  args.x = call.input("x");
  args.weight = call.input("weight");
  args.bias = call.input("bias");
  args.activation = call.activation();
  args.initial_state = call.input("initial_state");
  args.state_indices = call.input("state_indices");
  args.cu_seqlens = call.input("cu_seqlens");
  args.seq_idx = call.input("seq_idx");
  args.dout = call.input("dout");
  args.dfinal_state = call.input("dfinal_state");
  args.dx = call.gradient("dx");
  args.dweight = call.gradient("dweight");
  args.dbias = call.gradient("dbias");
  args.dinitial_state = call.gradient("dinitial_state");
  call.run(causal_conv1d_bwd_workspace_size, causal_conv1d_bwd, args);
}

template <typename Call>
MambaBlockWeights block_weights(Call& call) {
  MambaBlockWeights weights;
  weights.in_proj = call.input("in_proj");
  weights.in_proj_bias = call.input("in_proj_bias");
  weights.conv_weight = call.input("conv_weight");
  weights.conv_bias = call.input("conv_bias");
  weights.x_proj = call.input("x_proj");
  weights.dt_proj = call.input("dt_proj");
  weights.dt_bias = call.input("dt_bias");
  weights.A = call.input("A");
  weights.D = call.input("D");
  weights.out_proj = call.input("out_proj");
  weights.out_proj_bias = call.input("out_proj_bias");
  weights.dt_B_C_norm_eps = call.template value<float>("dt_B_C_norm_eps");
  return weights;
}

template <typename Call, typename Method>
MambaBlockSaved block_saved(Call& call, Method input_or_output) {
  MambaBlockSaved saved;
  saved.xz = (call.*input_or_output)("xz");
  saved.delta_B_C = (call.*input_or_output)("delta_B_C");
  saved.y = (call.*input_or_output)("y");
  saved.chunk_states = (call.*input_or_output)("chunk_states");
  saved.u = (call.*input_or_output)("u");
  saved.delta = (call.*input_or_output)("delta");
  return saved;
}

template <typename Call>
void call_mamba_block_train_fwd(Call& call) {
  const MambaBlockWeights weights = block_weights(call);
  MambaBlockTrainFwdArgs args;
  args.weights = &weights;
  args.x = call.input("x");
  args.initial_conv_state = call.input("initial_conv_state");
  args.initial_ssm_state = call.input("initial_ssm_state");
  args.final_conv_state = call.output("final_conv_state");
  args.last_ssm_state = call.output("last_ssm_state");
  args.cu_seqlens = call.input("cu_seqlens");
  args.saved = block_saved(call, &Call::output);
  args.out = call.output("out");
  call.run(mamba_block_train_fwd_workspace_size, mamba_block_train_fwd, args);
}

template <typename Call>
void call_mamba_block_bwd(Call& call) {
  const MambaBlockWeights weights = block_weights(call);
  MambaBlockBwdArgs args;
  args.weights = &weights;
  args.x = call.input("x");
  args.initial_conv_state = call.input("initial_conv_state");
  args.initial_ssm_state = call.input("initial_ssm_state");
  args.cu_seqlens = call.input("cu_seqlens");
  args.saved = block_saved(call, &Call::input);
  args.dout = call.input("dout");
  args.dfinal_conv_state = call.input("dfinal_conv_state");
  args.dlast_ssm_state = call.input("dlast_ssm_state");
  args.dx = call.gradient("dx");
  args.dinitial_conv_state = call.gradient("dinitial_conv_state");
  args.dinitial_ssm_state = call.gradient("dinitial_ssm_state");
  args.dweights.in_proj = call.gradient("din_proj");
  args.dweights.in_proj_bias = call.gradient("din_proj_bias");
  args.dweights.conv_weight = call.gradient("dconv_weight");
  args.dweights.conv_bias = call.gradient("dconv_bias");
  args.dweights.x_proj = call.gradient("dx_proj");
  args.dweights.dt_proj = call.gradient("ddt_proj");
  args.dweights.dt_bias = call.gradient("ddt_bias");
  args.dweights.A = call.gradient("dA");
  args.dweights.A_log = call.gradient("dA_log");
  args.dweights.D = call.gradient("dD");
  args.dweights.out_proj = call.gradient("dout_proj");
  args.dweights.out_proj_bias = call.gradient("dout_proj_bias");
  call.run(mamba_block_bwd_workspace_size, mamba_block_bwd, args);
}

}  // namespace ssmcore
