#include "ssmcore/model_config.h"

#include <cmath>
#include <limits>

#include "json_reader.h"
#include "model_config_json.h"
#include "ssmcore/causal_conv1d.h"
#include "ssmcore/error.h"

namespace ssmcore {
namespace {

using nlohmann::json;

// Far above any model, and low enough that the size in bytes of every weight, and of the states of
// all layers for one sequence, fits in 64 bits.
constexpr int64_t kMaxVocabSize = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxLayers = 100'000;
constexpr int64_t kMaxDim = int64_t{1} << 24;
constexpr int64_t kMaxDState = int64_t{1} << 16;

constexpr char kMamba[] = "mamba";
constexpr char kFalconMamba[] = "falcon_mamba";

// One object of a config.json. A field that is null is taken as absent.
class Fields {
 public:
  Fields(const json& object, const std::string& source) : object_(object), source_(source) {}

  // The field, or null.
  const json& at(const char* name) const {
    static const json null;
    const auto field = object_.find(name);
    return field == object_.end() ? null : *field;
  }
  bool has(const char* name) const { return !at(name).is_null(); }

  int64_t integer(const char* name, int64_t fallback, int64_t min, int64_t max) const {
    if (!has(name)) return fallback;
    const json& value = at(name);
    if (!value.is_number_integer() || value < min || value > max) {
      fail(name, "an integer from " + std::to_string(min) + " to " + std::to_string(max));
    }
    return value.get<int64_t>();
  }
  int64_t size(const char* name, int64_t fallback, int64_t max) const {
    return integer(name, fallback, 1, max);
  }
  double number(const char* name, double fallback) const {
    if (!has(name)) return fallback;
    if (!at(name).is_number()) fail(name, "a number");
    return at(name).get<double>();
  }
  float epsilon(const char* name, double fallback) const {
    const double value = number(name, fallback);
    if (!(value >= 0 && value <= 1)) fail(name, "a number from 0 to 1");
    return static_cast<float>(value);
  }
  bool flag(const char* name, bool fallback) const {
    if (!has(name)) return fallback;
    if (!at(name).is_boolean()) fail(name, "true or false");
    return at(name).get<bool>();
  }
  std::string string(const char* name, const char* fallback) const {
    if (!has(name)) return fallback;
    if (!at(name).is_string()) fail(name, "a string");
    return at(name).get<std::string>();
  }

  // expand · d_model, rounded down, as both packages have it; expand may be a fraction.
  int64_t expanded(int64_t d_model) const {
    const double dim = std::floor(number("expand", 2) * static_cast<double>(d_model));
    if (!(dim >= 1 && dim <= static_cast<double>(kMaxDim))) {
      fail("expand", "a number that gives 1 to " + std::to_string(kMaxDim) + " channels");
    }
    return static_cast<int64_t>(dim);
  }
  // "auto" stands for ceil(d_model / 16).
  int64_t dt_rank(const char* name, int64_t d_model) const {
    if (!has(name) || at(name) == "auto") return (d_model + 15) / 16;
    if (at(name).is_string()) fail(name, "an integer or \"auto\"");
    return size(name, 0, kMaxDim);
  }

  [[noreturn]] void fail(const char* name, const std::string& expected) const {
    throw Error(ErrorCode::invalid_checkpoint,
                source_ + ": " + name + ": expected " + expected + ", got " + shown(at(name)));
  }

 private:
  const json& object_;
  const std::string& source_;
};

// transformers' MambaConfig or FalconMambaConfig, with their defaults, which are the same.
ModelConfig read_transformers_config(const json& object, const std::string& source) {
  const Fields fields(object, source);
  const bool is_falcon = fields.at("model_type") == kFalconMamba;
  if (!is_falcon && fields.at("model_type") != kMamba) {
    fields.fail("model_type",
                std::string("a known model type (known: ") + kMamba + ", " + kFalconMamba + ")");
  }
  const std::string hidden_act = fields.string("hidden_act", "silu");
  if (hidden_act != "silu" && hidden_act != "swish") fields.fail("hidden_act", "silu or swish");

  ModelConfig config;
  config.format = CheckpointFormat::transformers;
  config.model_type = is_falcon ? kFalconMamba : kMamba;
  config.d_model = fields.size("hidden_size", 768, kMaxDim);
  config.vocab_size = fields.size("vocab_size", 50280, kMaxVocabSize);
  config.padded_vocab_size = config.vocab_size;
  config.layers.assign(static_cast<size_t>(fields.size("num_hidden_layers", 32, kMaxLayers)),
                       MixerType::mamba);
  config.dim = fields.has("intermediate_size") ? fields.size("intermediate_size", 0, kMaxDim)
                                               : fields.expanded(config.d_model);
  config.dstate = fields.size("state_size", 16, kMaxDState);
  config.width = fields.integer("conv_kernel", 4, kMinConvWidth, kMaxConvWidth);
  config.dt_rank = fields.dt_rank("time_step_rank", config.d_model);
  config.norm_eps = fields.epsilon("layer_norm_epsilon", 1e-5);
  if (is_falcon) {
    config.mixer_norm_eps = fields.epsilon("mixer_rms_eps", 1e-6);
    // There 0 says that there are no norms.
    if (config.mixer_norm_eps == 0) fields.fail("mixer_rms_eps", "a number above 0");
  }
  config.use_bias = fields.flag("use_bias", false);
  config.use_conv_bias = fields.flag("use_conv_bias", true);
  config.tie_embeddings = fields.flag("tie_word_embeddings", true);
  const json eos_token_id = object.value("eos_token_id", json(0));  // here null means none
  config.eos_token_ids = read_eos_token_ids(eos_token_id, config.vocab_size, source);
  return config;
}

// The upstream package's MambaConfig, with its defaults and those of its Mamba layer.
ModelConfig read_upstream_config(const json& object, const std::string& source) {
  const Fields fields(object, source);
  if (!fields.flag("rms_norm", true)) fields.fail("rms_norm", "true (LayerNorm is not supported)");
  const json& attention = fields.at("attn_layer_idx");
  if (!attention.is_null() && !(attention.is_array() && attention.empty())) {
    fields.fail("attn_layer_idx", "[] (attention layers are not supported)");
  }
  if (fields.has("d_intermediate") && fields.at("d_intermediate") != 0) {
    fields.fail("d_intermediate", "0 (MLP layers are not supported)");
  }
  const json no_settings = json::object();
  const json& ssm_cfg = fields.has("ssm_cfg") ? fields.at("ssm_cfg") : no_settings;
  if (!ssm_cfg.is_object()) fields.fail("ssm_cfg", "an object");
  const std::string ssm_source = source + ": ssm_cfg";
  const Fields ssm(ssm_cfg, ssm_source);
  if (ssm.string("layer", "Mamba1") != "Mamba1") {
    ssm.fail("layer", "a known layer (known: Mamba1)");
  }

  ModelConfig config;
  config.format = CheckpointFormat::upstream;
  config.model_type = kMamba;
  config.d_model = fields.size("d_model", 0, kMaxDim);
  config.vocab_size = fields.size("vocab_size", 50277, kMaxVocabSize);
  const int64_t multiple = fields.size("pad_vocab_size_multiple", 8, kMaxVocabSize);
  config.padded_vocab_size = (config.vocab_size + multiple - 1) / multiple * multiple;
  config.layers.assign(static_cast<size_t>(fields.size("n_layer", 64, kMaxLayers)),
                       MixerType::mamba);
  config.dim = ssm.expanded(config.d_model);
  config.dstate = ssm.size("d_state", 16, kMaxDState);
  config.width = ssm.integer("d_conv", 4, kMinConvWidth, kMaxConvWidth);
  config.dt_rank = ssm.dt_rank("dt_rank", config.d_model);
  config.use_bias = ssm.flag("bias", false);
  config.use_conv_bias = ssm.flag("conv_bias", true);
  config.tie_embeddings = fields.flag("tie_embeddings", true);
  // Not a field of the package, which leaves it to the tokenizer; some add it.
  config.eos_token_ids = read_eos_token_ids(fields.at("eos_token_id"), config.vocab_size, source);
  return config;
}

}  // namespace

ModelConfig read_model_config(const json& object, const std::string& source) {
  const Fields fields(object, source);
  const bool is_upstream = fields.has("d_model") && !fields.has("model_type");
  return is_upstream ? read_upstream_config(object, source)
                     : read_transformers_config(object, source);
}

std::vector<int64_t> read_eos_token_ids(const json& eos_token_id, int64_t vocab_size,
                                        const std::string& source) {
  std::vector<int64_t> ids;
  if (eos_token_id.is_null()) return ids;
  for (const json& id : eos_token_id.is_array() ? eos_token_id : json::array({eos_token_id})) {
    if (!id.is_number_integer()) {
      throw Error(ErrorCode::invalid_checkpoint, source +
                                                     ": eos_token_id: expected an integer, a list "
                                                     "of integers or null, got " +
                                                     shown(eos_token_id));
    }
    if (id >= 0 && id < vocab_size) ids.push_back(id.get<int64_t>());
  }
  return ids;
}

ModelConfig parse_model_config(const std::string& json) {
  const std::string source = "parse_model_config";
  return read_model_config(parse_json_object(json, source), source);
}

}  // namespace ssmcore
