// The Mamba block as a mixer.
#include <cmath>

#include "kernels.h"
#include "mixer.h"
#include "scratch.h"
#include "ssmcore/mamba_block.h"
#include "weight_loader.h"

namespace ssmcore {
namespace {

class MambaMixer final : public Mixer {
 public:
  MambaMixer(const ModelConfig& config, int64_t layer, DType dtype, WeightLoader& loader)
      : dtype_(dtype),
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
    weights_.A = loader.channels_last("mixer.A_log", layer, {dim, dstate},
                                      [](float A_log) { return -std::exp(A_log); });
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
