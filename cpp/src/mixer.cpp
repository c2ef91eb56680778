#include "mixer.h"

namespace ssmcore {

std::unique_ptr<Mixer> make_mixer(const ModelConfig& config, int64_t layer, DType dtype,
                                  WeightLoader& loader) {
  switch (config.layers[static_cast<size_t>(layer)]) {
    case MixerType::mamba:
      break;
  }
  return make_mamba_mixer(config, layer, dtype, loader);
}

}  // namespace ssmcore
