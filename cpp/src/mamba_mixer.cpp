// The Mamba block as a mixer.
#include <algorithm>

#include "kernels.h"
#include "mixer.h"
#include "scratch.h"
#include "ssmcore/mamba_block.h"
#include "ssmcore/mamba_block_train.h"
#include "strided.h"
#include "weight_loader.h"

namespace ssmcore {
namespace {

// Of a scan's states over sequences from their start.
int64_t num_chunks(int64_t seqlen, const TensorView& cu_seqlens) {
  if (!cu_seqlens) return ceil_div(seqlen, kMambaBlockChunkSize);
  const auto end = [&](int64_t s) {
    return cu_seqlens.as<const int32_t>()[s * cu_seqlens.strides[0]];
  };
  int64_t sum = 0;
  for (int64_t s = 0; s + 1 < cu_seqlens.shape[0]; ++s)
    sum += ceil_div(end(s + 1) - end(s), kMambaBlockChunkSize);
  return sum;
}

class MambaMixer final : public Mixer {
 public:
  MambaMixer(const ModelConfig& config, int64_t layer, DType dtype, WeightLoader& loader)
      : layer_(layer),
        dtype_(dtype),
        conv_state_{dtype, {config.width - 1, config.dim}},
        ssm_state_{DType::float32, {config.dstate, config.dim}} {
    const int64_t dim = config.dim, dstate = config.dstate, d_model = config.d_model;
    weights_.in_proj = loader.matrix("mixer.in_proj.weight", layer, 2 * dim, d_model);
    weights_.conv_weight =
        loader.channels_last("mixer.conv1d.weight", layer, {dim, 1, config.width});
    weights_.x_proj = loader.matrix("mixer.x_proj.weight", layer, config.dt_rank + 2 * dstate, dim);
    weights_.dt_proj = loader.matrix("mixer.dt_proj.weight", layer, dim, config.dt_rank);
    weights_.dt_bias = loader.parameter("mixer.dt_proj.bias", layer, {dim});
    weights_.D = loader.parameter("mixer.D", layer, {dim});
    weights_.out_proj = loader.matrix("mixer.out_proj.weight", layer, d_model, dim);
    if (config.use_conv_bias)
      weights_.conv_bias = loader.parameter("mixer.conv1d.bias", layer, {dim});
    if (config.use_bias) {
      weights_.in_proj_bias = loader.parameter("mixer.in_proj.bias", layer, {2 * dim});
      weights_.out_proj_bias = loader.parameter("mixer.out_proj.bias", layer, {d_model});
    }
    weights_.A =
        loader.channels_last("mixer.A_log", layer, {dim, dstate}, ParameterMap::negative_exp);
    weights_.dt_B_C_norm_eps = config.mixer_norm_eps;
  }

  std::vector<StateSpec> state_specs() const override { return {conv_state_, ssm_state_}; }

  size_t workspace_size(const MixerFwdArgs& args, const Context& context) const override {
    return mamba_block_fwd_workspace_size(block(args), context);
  }

  void forward(const MixerFwdArgs& args, const Exec& exec) const override {
    mamba_block_fwd(block(args), exec);
  }

  std::optional<size_t> step_workspace_size(const LayerStepArgs& args,
                                            const Context& context) const override {
    const Kernel<MambaStepParams>& kernel = kernel_table(context).mamba_step;
    if (!kernel.run || !has_step()) return {};
    Scratch scratch = Scratch::nowhere();
    const size_t size = kernel.workspace_size(step_params(args, scratch), context);
    if (size == kNoKernel) return {};
    return scratch.used() + size;
  }

  void step(const LayerStepArgs& args, const Exec& exec) const override {
    Scratch scratch(exec.workspace);
    const MambaStepParams params = step_params(args, scratch);
    launch("mamba_step", kernel_table(exec.context).mamba_step, params, scratch.rest(exec));
  }

  size_t saved_size(const MixerTrainArgs& args, const Context&) const override {
    Scratch scratch = Scratch::nowhere();
    place_saved(args, scratch);
    return scratch.used();
  }

  size_t train_workspace_size(const MixerTrainArgs& args, const NamedGradients& gradients,
                              const Context& context) const override {
    // x stands for what has its shape.
    const MambaBlockBwdArgs bwd = backward_block(args, args.x, args.x, gradients);
    return std::max(mamba_block_train_fwd_workspace_size(forward_block(args, args.x), context),
                    mamba_block_bwd_workspace_size(bwd, context));
  }

  void train_forward(const MixerTrainArgs& args, const TensorView& out,
                     const Exec& exec) const override {
    mamba_block_train_fwd(forward_block(args, out), exec);
  }

  void backward(const MixerTrainArgs& args, const TensorView& dout, const TensorView& dx,
                const NamedGradients& gradients, const Exec& exec) const override {
    mamba_block_bwd(backward_block(args, dout, dx, gradients), exec);
  }

 private:
  // Whether the weights are such as the kernel of a step takes.
  bool has_step() const {
    const MambaBlockWeights& w = weights_;
    bool same_dtype = true;
    for (const Weight* matrix : {&w.in_proj, &w.x_proj, &w.dt_proj, &w.out_proj})
      same_dtype = same_dtype && matrix->data.dtype == dtype_;
    return same_dtype && w.dt_B_C_norm_eps == 0 && w.A.shape[1] == MambaStepParams::kDstate &&
           w.conv_weight.shape[1] == MambaStepParams::kWidth;
  }

  MambaStepParams step_params(const LayerStepArgs& args, Scratch& scratch) const {
    const MambaBlockWeights& w = weights_;
    MambaStepParams p{};
    p.dtype = dtype_;
    p.rows = args.residual.shape[0];
    p.slots = args.states[0].shape[0];
    p.d_model = args.residual.shape[1];
    p.dim = w.A.shape[0];
    p.dt_rank = w.dt_proj.cols();
    p.eps = args.eps;
    p.residual = args.residual.as<float>();
    p.norm = args.norm.as<const float>();
    p.next_norm = args.next_norm.as<const float>();
    p.is_first = args.is_first;
    p.in_proj = w.in_proj.data.data;
    p.x_proj = w.x_proj.data.data;
    p.dt_proj = w.dt_proj.data.data;
    p.out_proj = w.out_proj.data.data;
    p.in_proj_bias = w.in_proj_bias.as<const float>();
    p.out_proj_bias = w.out_proj_bias.as<const float>();
    p.conv_weight = w.conv_weight.as<const float>();
    p.conv_bias = w.conv_bias.as<const float>();
    p.dt_bias = w.dt_bias.as<const float>();
    p.A = w.A.as<const float>();
    p.D = w.D.as<const float>();
    p.conv_state = args.states[0].data;
    p.ssm_state = args.states[1].as<float>();
    p.conv_state_stride = args.states[0].strides[0];
    p.ssm_state_stride = args.states[1].strides[0];
    p.state_indices = args.state_indices.as<const int32_t>();
    const size_t channels = static_cast<size_t>(p.rows * p.dim) * dtype_size(dtype_);
    p.u = scratch.bytes(channels);
    p.z = scratch.bytes(channels);
    p.y = scratch.bytes(channels);
    p.x = scratch.bytes(static_cast<size_t>(p.rows * p.d_model) * dtype_size(dtype_));
    p.squares = scratch.floats(p.rows * ceil_div(p.d_model, 16));
    p.delta_B_C = scratch.floats(p.rows * (p.dt_rank + 2 * MambaStepParams::kDstate));
    return p;
  }

  MambaBlockFwdArgs block(const MixerFwdArgs& args) const {
    MambaBlockFwdArgs block;
    block.weights = &weights_;
    block.x = args.x;
    block.out = args.out;
    // Channels are contiguous in memory; the block's shapes have them in front.
    block.conv_state = args.states[0].transpose(1, 2);
    block.ssm_state = args.states[1].transpose(1, 2);
    block.state_indices = args.state_indices;
    block.cu_seqlens = args.cu_seqlens;
    return block;
  }

  MambaBlockSaved place_saved(const MixerTrainArgs& args, Scratch& scratch) const {
    const int64_t batch = args.x.shape[0], seqlen = args.x.shape[1];
    const int64_t dim = weights_.A.shape[0], dstate = weights_.A.shape[1];
    const auto activation = [&](int64_t n) {
      return scratch.tensor(args.x.dtype, {batch, seqlen, n}, args.x.device);
    };
    MambaBlockSaved saved;
    saved.xz = activation(2 * dim);
    saved.delta_B_C = activation(weights_.x_proj.rows());
    saved.y = activation(dim);
    // Channels are contiguous in memory, as in the states.
    const int64_t chunks = num_chunks(seqlen, args.host_cu_seqlens);
    saved.chunk_states =
        scratch.tensor(DType::float32, {batch, chunks, dstate, dim}, args.x.device).transpose(2, 3);
    return saved;
  }

  MambaBlockTrainFwdArgs forward_block(const MixerTrainArgs& args, const TensorView& out) const {
    MambaBlockTrainFwdArgs block;
    block.weights = &weights_;
    block.x = args.x;
    block.out = out;
    block.cu_seqlens = args.cu_seqlens;
    Scratch saved = args.saved ? Scratch(args.saved) : Scratch::nowhere();
    block.saved = place_saved(args, saved);
    return block;
  }

  MambaBlockBwdArgs backward_block(const MixerTrainArgs& args, const TensorView& dout,
                                   const TensorView& dx, const NamedGradients& gradients) const {
    MambaBlockBwdArgs block;
    block.weights = &weights_;
    block.x = args.x;
    block.cu_seqlens = args.cu_seqlens;
    Scratch saved = args.saved ? Scratch(args.saved) : Scratch::nowhere();
    block.saved = place_saved(args, saved);
    block.dout = dout;
    block.dx = {dx};
    const auto of = [&](const char* field) { return gradient_of(gradients, field, layer_); };
    MambaBlockWeightGradients& dweights = block.dweights;
    dweights.in_proj = of("mixer.in_proj.weight");
    dweights.in_proj_bias = of("mixer.in_proj.bias");
    dweights.conv_weight = of("mixer.conv1d.weight");
    if (TensorView& dweight = dweights.conv_weight.tensor) dweight = dweight.select(1, 0);
    dweights.conv_bias = of("mixer.conv1d.bias");
    dweights.x_proj = of("mixer.x_proj.weight");
    dweights.dt_proj = of("mixer.dt_proj.weight");
    dweights.dt_bias = of("mixer.dt_proj.bias");
    dweights.A_log = of("mixer.A_log");
    dweights.D = of("mixer.D");
    dweights.out_proj = of("mixer.out_proj.weight");
    dweights.out_proj_bias = of("mixer.out_proj.bias");
    return block;
  }

  int64_t layer_;
  DType dtype_;
  MambaBlockWeights weights_;
  StateSpec conv_state_, ssm_state_;
};

}  // namespace

std::unique_ptr<Mixer> make_mamba_mixer(const ModelConfig& config, int64_t layer, DType dtype,
                                        WeightLoader& loader) {
  return std::make_unique<MambaMixer>(config, layer, dtype, loader);
}

}  // namespace ssmcore
