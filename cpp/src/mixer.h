// What a language model needs of a layer's mixer, whatever it is.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "ssmcore/context.h"
#include "ssmcore/language_model.h"
#include "ssmcore/model_config.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

class WeightLoader;

// One tensor that a mixer carries from token to token: its dtype and the shape of one slot, in
// memory order.
struct StateSpec {
  DType dtype;
  int64_t shape[2];
};

struct MixerFwdArgs {
  TensorView x, out;         // (batch, seqlen, d_model), contiguous, activation type
  const TensorView* states;  // one for each of state_specs(), (slots, ...shape)
  TensorView state_indices;  // optional (batch), int32
  TensorView cu_seqlens;  // optional (sequences + 1), int32: packed; they are the rows for states
};

// Training on whole sequences from their start.
struct MixerTrainArgs {
  TensorView x;                // (batch, seqlen, d_model), contiguous, activation type
  TensorView cu_seqlens;       // optional (sequences + 1), int32: packed
  TensorView host_cu_seqlens;  // the same in memory of the host
  void* saved = nullptr;       // what the forward pass leaves for the backward pass
};

// One token of each row through a whole layer: residual += mixer(norm(residual)).
struct LayerStepArgs {
  TensorView residual;       // (rows, d_model), float32, contiguous, updated
  TensorView norm;           // (d_model)
  TensorView next_norm;      // of the layer after; absent for the last
  bool is_first;             // of the layers: all have the same workspace, whose contents stay
  float eps;                 // of the norm
  const TensorView* states;  // as in MixerFwdArgs
  TensorView state_indices;  // (rows), int32, contiguous
};

class Mixer {
 public:
  virtual ~Mixer() = default;
  virtual std::vector<StateSpec> state_specs() const = 0;
  virtual size_t workspace_size(const MixerFwdArgs& args, const Context& context) const = 0;
  virtual void forward(const MixerFwdArgs& args, const Exec& exec) const = 0;
  // Workspace that step() needs; nothing where there is no kernel for it, so that the norm and
  // forward() are the way.
  virtual std::optional<size_t> step_workspace_size(const LayerStepArgs& args,
                                                    const Context& context) const = 0;
  virtual void step(const LayerStepArgs& args, const Exec& exec) const = 0;

  virtual size_t saved_size(const MixerTrainArgs& args, const Context& context) const = 0;
  // Of either pass.
  virtual size_t train_workspace_size(const MixerTrainArgs& args, const NamedGradients& gradients,
                                      const Context& context) const = 0;
  virtual void train_forward(const MixerTrainArgs& args, const TensorView& out,
                             const Exec& exec) const = 0;
  // dout and dx are like x; dx is written. `gradients` are those of the whole model.
  virtual void backward(const MixerTrainArgs& args, const TensorView& dout, const TensorView& dx,
                        const NamedGradients& gradients, const Exec& exec) const = 0;
};

// The mixer of layer `layer`, its weights taken from `loader`.
std::unique_ptr<Mixer> make_mixer(const ModelConfig& config, int64_t layer, DType dtype,
                                  WeightLoader& loader);

std::unique_ptr<Mixer> make_mamba_mixer(const ModelConfig& config, int64_t layer, DType dtype,
                                        WeightLoader& loader);

}  // namespace ssmcore
