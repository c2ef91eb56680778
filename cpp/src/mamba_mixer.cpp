// The Mamba block as a mixer.
#include <cmath>

#include "mixer.h"
#include "ssmcore/mamba_block.h"
#include "weight_loader.h"

namespace ssmcore {
namespace {

class MambaMixer final : public Mixer {
 public:
  MambaMixer(const ModelConfig& config, int64_t layer, DType dtype, WeightLoader& loader)
      : conv_state_{dtype, {config.width - 1, config.dim}},
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
    weights_.A = loader.channels_last("mixer.A_log", layer, {dim, dstate});
    float* A = weights_.A.as<float>();  // -exp(A_log)
    for (int64_t i = 0; i < dim * dstate; ++i) A[i] = -std::exp(A[i]);
    weights_.dt_B_C_norm_eps = config.mixer_norm_eps;
  }

  std::vector<StateSpec> state_specs() const override { return {conv_state_, ssm_state_}; }

  size_t workspace_size(const MixerFwdArgs& args, const Context& context) const override {
    return mamba_block_fwd_workspace_size(block(args), context);
  }

  void forward(const MixerFwdArgs& args, const Exec& exec) const override {
    mamba_block_fwd(block(args), exec);
  }

 private:
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

  MambaBlockWeights weights_;
  StateSpec conv_state_, ssm_state_;
};

}  // namespace

std::unique_ptr<Mixer> make_mamba_mixer(const ModelConfig& config, int64_t layer, DType dtype,
                                        WeightLoader& loader) {
  return std::make_unique<MambaMixer>(config, layer, dtype, loader);
}

}  // namespace ssmcore
