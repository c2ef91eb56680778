// The operators, each taking the fields of its C++ arguments as keywords. ssmcore/ops.py gives them
// their public form.
#include "call.h"
#include "operators.h"
#include "ssmcore/adamw.h"
#include "ssmcore/cross_entropy.h"
#include "ssmcore/embedding.h"
#include "ssmcore/linear.h"
#include "ssmcore/rms_norm.h"
#include "ssmcore/sample.h"
#include "ssmcore/selective_state_update.h"

namespace py = pybind11;

namespace ssmcore {
namespace {

void py_selective_scan(const py::kwargs& arguments) {
  Call call("selective_scan", arguments);
  call_selective_scan(call);
}

void py_selective_scan_bwd(const py::kwargs& arguments) {
  Call call("selective_scan_bwd", arguments);
  call_selective_scan_bwd(call);
}

void py_selective_state_update(const py::kwargs& arguments) {
  Call call("selective_state_update", arguments);
  SelectiveStateUpdateArgs args;
  args.state = call.output("state");
  args.x = call.input("x");
  args.dt = call.input("dt");
  args.A = call.input("A");
  args.B = call.input("B");
  args.C = call.input("C");
  args.D = call.input("D");
  args.z = call.input("z");
  args.dt_bias = call.input("dt_bias");
  args.dt_softplus = call.value<bool>("dt_softplus");
  args.state_indices = call.input("state_indices");
  args.out = call.output("out");
  call.run(selective_state_update_workspace_size, selective_state_update, args);
}

void py_causal_conv1d(const py::kwargs& arguments) {
  Call call("causal_conv1d", arguments);
  call_causal_conv1d(call);
}

void py_causal_conv1d_update(const py::kwargs& arguments) {
  Call call("causal_conv1d_update", arguments);
  CausalConv1dUpdateArgs args;
  args.x = call.input("x");
  args.conv_state = call.output("conv_state");
  args.weight = call.input("weight");
  args.bias = call.input("bias");
  args.activation = call.activation();
  args.cache_seqlens = call.input("cache_seqlens");
  args.state_indices = call.input("state_indices");
  args.out = call.output("out");
  call.run(causal_conv1d_update_workspace_size, causal_conv1d_update, args);
}

void py_causal_conv1d_bwd(const py::kwargs& arguments) {
  Call call("causal_conv1d_bwd", arguments);
  call_causal_conv1d_bwd(call);
}

void py_rms_norm(const py::kwargs& arguments) {
  Call call("rms_norm", arguments);
  RmsNormFwdArgs args;
  args.x = call.input("x");
  args.weight = call.input("weight");
  args.residual = call.input("residual");
  args.residual_out = call.output("residual_out");
  args.z = call.input("z");
  args.out = call.output("out");
  args.group_size = call.value<int64_t>("group_size");
  args.norm_before_gate = call.value<bool>("norm_before_gate");
  args.eps = call.value<float>("eps");
  call.run(rms_norm_fwd_workspace_size, rms_norm_fwd, args);
}

void py_rms_norm_bwd(const py::kwargs& arguments) {
  Call call("rms_norm_bwd", arguments);
  RmsNormBwdArgs args;
  args.x = call.input("x");
  args.weight = call.input("weight");
  args.residual = call.input("residual");
  args.z = call.input("z");
  args.group_size = call.value<int64_t>("group_size");
  args.norm_before_gate = call.value<bool>("norm_before_gate");
  args.eps = call.value<float>("eps");
  args.dout = call.input("dout");
  args.dresidual_out = call.input("dresidual_out");
  args.dx = call.gradient("dx");
  args.dresidual = call.gradient("dresidual");
  args.dz = call.gradient("dz");
  args.dweight = call.gradient("dweight");
  call.run(rms_norm_bwd_workspace_size, rms_norm_bwd, args);
}

void py_linear(const py::kwargs& arguments) {
  Call call("linear", arguments);
  LinearArgs args;
  args.x = call.input("x");
  args.weight = call.input("weight");
  args.bias = call.input("bias");
  args.out = call.output("out");
  call.run(linear_workspace_size, linear, args);
}

void py_linear_bwd(const py::kwargs& arguments) {
  Call call("linear_bwd", arguments);
  LinearBwdArgs args;
  args.x = call.input("x");
  args.weight = call.input("weight");
  args.dout = call.input("dout");
  args.dx = call.gradient("dx");
  args.dweight = call.gradient("dweight");
  args.dbias = call.gradient("dbias");
  call.run(linear_bwd_workspace_size, linear_bwd, args);
}

void py_embedding(const py::kwargs& arguments) {
  Call call("embedding", arguments);
  EmbeddingArgs args;
  args.token_ids = call.input("token_ids");
  args.weight = call.input("weight");
  args.out = call.output("out");
  call.run<EmbeddingArgs>(nullptr, embedding, args);
}

void py_embedding_bwd(const py::kwargs& arguments) {
  Call call("embedding_bwd", arguments);
  EmbeddingBwdArgs args;
  args.token_ids = call.input("token_ids");
  args.dout = call.input("dout");
  args.dweight = call.gradient("dweight");
  call.run(embedding_bwd_workspace_size, embedding_bwd, args);
}

void py_cross_entropy(const py::kwargs& arguments) {
  Call call("cross_entropy", arguments);
  CrossEntropyFwdArgs args;
  args.logits = call.input("logits");
  args.targets = call.input("targets");
  args.ignore_index = call.value<int64_t>("ignore_index");
  args.loss = call.output("loss");
  args.mean_loss = call.output("mean_loss");
  args.lse = call.output("lse");
  call.run(cross_entropy_fwd_workspace_size, cross_entropy_fwd, args);
}

void py_cross_entropy_bwd(const py::kwargs& arguments) {
  Call call("cross_entropy_bwd", arguments);
  CrossEntropyBwdArgs args;
  args.logits = call.input("logits");
  args.targets = call.input("targets");
  args.ignore_index = call.value<int64_t>("ignore_index");
  args.lse = call.input("lse");
  args.dloss = call.input("dloss");
  args.dmean_loss = call.input("dmean_loss");
  args.dlogits = call.gradient("dlogits");
  call.run(cross_entropy_bwd_workspace_size, cross_entropy_bwd, args);
}

void py_sum_of_squares(const py::kwargs& arguments) {
  Call call("sum_of_squares", arguments);
  SumOfSquaresArgs args;
  args.x = call.input("x");
  args.out = call.output("out");
  call.run(sum_of_squares_workspace_size, sum_of_squares, args);
}

void py_adamw(const py::kwargs& arguments) {
  Call call("adamw", arguments);
  AdamWArgs args;
  args.parameter = call.output("parameter");
  args.master = call.output("master");
  args.gradient = call.input("gradient");
  args.exp_avg = call.output("exp_avg");
  args.exp_avg_sq = call.output("exp_avg_sq");
  args.sum_of_squares = call.input("sum_of_squares");
  args.max_norm = call.value<double>("max_norm");
  args.step = call.value<int64_t>("step");
  args.lr = call.value<double>("lr");
  args.beta1 = call.value<double>("beta1");
  args.beta2 = call.value<double>("beta2");
  args.eps = call.value<double>("eps");
  args.weight_decay = call.value<double>("weight_decay");
  call.run<AdamWArgs>(nullptr, adamw, args);
}

void py_sample(const py::kwargs& arguments) {
  Call call("sample", arguments);
  SampleArgs args;
  args.logits = call.input("logits");
  args.history = call.input("history");
  args.repetition_penalty = call.input("repetition_penalty");
  args.temperature = call.input("temperature");
  args.top_k = call.input("top_k");
  args.top_p = call.input("top_p");
  args.min_p = call.input("min_p");
  args.seed = call.input("seed");
  args.position = call.input("position");
  args.out = call.output("out");
  call.run(sample_workspace_size, sample, args);
}

void py_mamba_block(const py::kwargs& arguments) {
  Call call("mamba_block", arguments);
  const MambaBlockWeights weights = block_weights(call);
  MambaBlockFwdArgs args;
  args.weights = &weights;
  args.x = call.input("x");
  args.conv_state = call.output("conv_state");
  args.ssm_state = call.output("ssm_state");
  args.state_indices = call.input("state_indices");
  args.cu_seqlens = call.input("cu_seqlens");
  args.out = call.output("out");
  call.run(mamba_block_fwd_workspace_size, mamba_block_fwd, args);
}

void py_mamba_block_train_fwd(const py::kwargs& arguments) {
  Call call("mamba_block_train_fwd", arguments);
  call_mamba_block_train_fwd(call);
}

void py_mamba_block_bwd(const py::kwargs& arguments) {
  Call call("mamba_block_bwd", arguments);
  call_mamba_block_bwd(call);
}

}  // namespace

void bind_ops(py::module_& module) {
  module.def("selective_scan", &py_selective_scan);
  module.def("selective_scan_bwd", &py_selective_scan_bwd);
  module.def("selective_state_update", &py_selective_state_update);
  module.def("causal_conv1d", &py_causal_conv1d);
  module.def("causal_conv1d_bwd", &py_causal_conv1d_bwd);
  module.def("causal_conv1d_update", &py_causal_conv1d_update);
  module.def("rms_norm", &py_rms_norm);
  module.def("rms_norm_bwd", &py_rms_norm_bwd);
  module.def("linear", &py_linear);
  module.def("linear_bwd", &py_linear_bwd);
  module.def("embedding", &py_embedding);
  module.def("embedding_bwd", &py_embedding_bwd);
  module.def("cross_entropy", &py_cross_entropy);
  module.def("cross_entropy_bwd", &py_cross_entropy_bwd);
  module.def("sum_of_squares", &py_sum_of_squares);
  module.def("adamw", &py_adamw);
  module.def("sample", &py_sample);
  module.def("mamba_block", &py_mamba_block);
  module.def("mamba_block_train_fwd", &py_mamba_block_train_fwd);
  module.def("mamba_block_bwd", &py_mamba_block_bwd);
  module.attr("MAMBA_BLOCK_CHUNK_SIZE") = kMambaBlockChunkSize;
}

}  // namespace ssmcore
