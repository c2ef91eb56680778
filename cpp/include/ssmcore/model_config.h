// What a checkpoint's config.json says of a model, whichever package wrote it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ssmcore {

// Which package's names and conventions a checkpoint follows.
enum class CheckpointFormat : uint8_t { transformers, upstream };

enum class MixerType : uint8_t { mamba };

struct ModelConfig {
  CheckpointFormat format = CheckpointFormat::transformers;
  std::string model_type;  // as transformers names it: "mamba" or "falcon_mamba"
  int64_t d_model = 0;
  int64_t vocab_size = 0;         // ids and logits; the embedding may have more rows as padding
  int64_t padded_vocab_size = 0;  // rows of the embedding and of the head
  std::vector<MixerType> layers;  // one mixer a layer
  int64_t dim = 0;                // channels of the scan, expand · d_model
  int64_t dstate = 16;
  int64_t width = 4;
  int64_t dt_rank = 0;
  float norm_eps = 1e-5f;
  float mixer_norm_eps = 0;   // falcon_mamba: of the norms on Δ, B and C; else 0
  bool use_bias = false;      // in_proj and out_proj have biases
  bool use_conv_bias = true;  // the convolution has one
  bool tie_embeddings = true;
  std::vector<int64_t> eos_token_ids;  // empty: the model has no end-of-sequence token
};

// Reads the text of a config.json, of transformers (`model_type` mamba) or of the upstream package
// (d_model, ssm_cfg). `Infinity` may be bare, as Python writes it, or a string. Sizes are checked
// to be positive. Throws Error(invalid_checkpoint) naming the field, or the known model types.
ModelConfig parse_model_config(const std::string& json);

}  // namespace ssmcore
