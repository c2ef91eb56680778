// save_checkpoint: a model folder as transformers writes it.
#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "checks.h"
#include "new_file.h"
#include "safetensors.h"
#include "ssmcore/checkpoint.h"
#include "ssmcore/error.h"
#include "weight_loader.h"

namespace ssmcore {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr char kOp[] = "save_checkpoint";
constexpr char kEmbedding[] = "backbone.embeddings.weight";
constexpr char kHead[] = "lm_head.weight";

// The shortest decimal that is this float: 1e-5 and not 9.999999747e-06.
json shortest(float value) {
  char text[32];
  *std::to_chars(text, text + sizeof(text) - 1, value).ptr = '\0';
  return std::strtod(text, nullptr);
}

json eos_token_id(const ModelConfig& config) {
  if (config.eos_token_ids.empty()) return nullptr;
  if (config.eos_token_ids.size() == 1) return config.eos_token_ids.front();
  return config.eos_token_ids;
}

json config_json(const ModelConfig& config, DType dtype) {
  const bool is_falcon = config.mixer_norm_eps > 0;
  json object = {
      {"architectures", {is_falcon ? "FalconMambaForCausalLM" : "MambaForCausalLM"}},
      {"model_type", config.model_type},
      {"dtype", dtype_name(dtype)},
      {"vocab_size", config.vocab_size},
      {"hidden_size", config.d_model},
      {"num_hidden_layers", config.layers.size()},
      {"expand", std::max<int64_t>(1, config.dim / config.d_model)},
      {"intermediate_size", config.dim},  // overrules expand, which need not be whole
      {"state_size", config.dstate},
      {"conv_kernel", config.width},
      {"time_step_rank", config.dt_rank},
      {"layer_norm_epsilon", shortest(config.norm_eps)},
      {"hidden_act", "silu"},
      {"residual_in_fp32", true},
      {"use_bias", config.use_bias},
      {"use_conv_bias", config.use_conv_bias},
      {"tie_word_embeddings", config.tie_embeddings},
      {"eos_token_id", eos_token_id(config)},
  };
  if (is_falcon) object["mixer_rms_eps"] = shortest(config.mixer_norm_eps);
  return object;
}

// What transformers stores.
std::vector<NamedTensor> tensors_to_write(const Checkpoint& checkpoint) {
  const ModelConfig& config = checkpoint.config;
  std::vector<NamedTensor> tensors;
  for (auto [stored_name, tensor] : checkpoint.tensors.tensors) {
    const std::string name = transformers_name(stored_name);
    const bool is_head = name == kHead;
    if (is_head && config.tie_embeddings) continue;
    const bool is_by_token = is_head || name == kEmbedding;
    if (is_by_token && tensor.rank == 2 && tensor.shape[0] == config.padded_vocab_size)
      tensor = tensor.slice(0, 0, config.vocab_size);
    if (std::find(kActivationTypes.begin(), kActivationTypes.end(), tensor.dtype) ==
        kActivationTypes.end())
      throw Error(ErrorCode::invalid_argument, std::string(kOp) + ": tensor " + name +
                                                   " has dtype " + dtype_name(tensor.dtype) +
                                                   ", expected float32, bfloat16 or float16");
    tensors.emplace_back(name, tensor);
  }
  return tensors;
}

}  // namespace

void save_checkpoint(const Checkpoint& checkpoint, const std::string& folder) {
  const fs::path path(folder);
  std::error_code error;
  fs::create_directories(path, error);
  if (error)
    throw Error(ErrorCode::not_found,
                std::string(kOp) + ": " + path.string() + ": " + error.message());
  std::vector<NamedTensor> tensors = tensors_to_write(checkpoint);
  const auto embedding =
      std::find_if(tensors.begin(), tensors.end(),
                   [](const NamedTensor& tensor) { return tensor.first == kEmbedding; });
  const DType dtype = embedding == tensors.end() ? DType::float32 : embedding->second.dtype;

  NewFile weights(kOp, path / "model.safetensors"), config(kOp, path / "config.json"),
      generation_config(kOp, path / "generation_config.json");
  write_safetensors(kOp, std::move(tensors), weights);
  config.write(config_json(checkpoint.config, dtype).dump(2) + "\n");
  generation_config.write(json{{"eos_token_id", eos_token_id(checkpoint.config)}}.dump(2) + "\n");
  for (const NewFile* file : {&weights, &config, &generation_config}) file->flush();
  for (NewFile* file : {&weights, &config, &generation_config}) file->publish();
}

}  // namespace ssmcore
