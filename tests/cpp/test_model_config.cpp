// parse_model_config: fields, defaults and refusals of both formats.
#include <doctest/doctest.h>

#include <random>
#include <string>
#include <vector>

#include "mutants.h"
#include "ssmcore/error.h"
#include "ssmcore/model_config.h"

using namespace ssmcore;

namespace {

// The message of the Error(invalid_checkpoint) that parsing must end in.
std::string refusal(const std::string& json) {
  try {
    parse_model_config(json);
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::invalid_checkpoint);
    return error.what();
  }
  FAIL("accepted: " << json);
  return {};
}

void check_refused(const std::string& json, const std::string& expected) {
  const std::string message = refusal(json);
  CHECK_MESSAGE(message.find(expected) != std::string::npos, json << " gave: " << message);
}

// A config.json with one more field.
std::string transformers_json(const std::string& field) {
  return R"({"model_type": "mamba", "hidden_size": 40)" + (field.empty() ? "" : ", " + field) + "}";
}
std::string upstream_json(const std::string& field) {
  return R"({"d_model": 40)" + (field.empty() ? "" : ", " + field) + "}";
}

}  // namespace

TEST_CASE("parse_model_config: falcon_mamba") {
  const ModelConfig config = parse_model_config(R"({
    "model_type": "falcon_mamba", "hidden_size": 64, "intermediate_size": 48, "expand": 16,
    "mixer_rms_eps": 1e-4, "tie_word_embeddings": false})");
  CHECK(config.model_type == "falcon_mamba");
  CHECK(config.mixer_norm_eps == 1e-4f);
  CHECK(config.dim == 48);
  CHECK_FALSE(config.tie_embeddings);
  const std::string falcon = R"({"model_type": "falcon_mamba")";
  CHECK(parse_model_config(falcon + "}").mixer_norm_eps == 1e-6f);
  CHECK(parse_model_config(falcon + "}").d_model == 768);
  for (const char* eps : {"0", "-1", "2", "\"a\"", "1e-60"})
    check_refused(falcon + R"(, "mixer_rms_eps": )" + eps + "}", "mixer_rms_eps");
  CHECK(parse_model_config(transformers_json("\"mixer_rms_eps\": 1")).mixer_norm_eps == 0);
}

TEST_CASE("parse_model_config: every field of transformers") {
  const ModelConfig config = parse_model_config(R"({
    "model_type": "mamba", "hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 101,
    "state_size": 8, "expand": 3, "conv_kernel": 2, "time_step_rank": 5,
    "layer_norm_epsilon": 1e-6, "use_bias": true, "use_conv_bias": false,
    "tie_word_embeddings": false, "eos_token_id": [7, 9], "hidden_act": "swish"})");
  CHECK(config.format == CheckpointFormat::transformers);
  CHECK(config.model_type == "mamba");
  CHECK(config.d_model == 48);
  CHECK(config.layers == std::vector<MixerType>(3, MixerType::mamba));
  CHECK(config.vocab_size == 101);
  CHECK(config.padded_vocab_size == 101);
  CHECK(config.dstate == 8);
  CHECK(config.dim == 144);
  CHECK(config.width == 2);
  CHECK(config.dt_rank == 5);
  CHECK(config.norm_eps == 1e-6f);
  CHECK(config.use_bias);
  CHECK_FALSE(config.use_conv_bias);
  CHECK_FALSE(config.tie_embeddings);
  CHECK(config.eos_token_ids == std::vector<int64_t>{7, 9});
}

TEST_CASE("parse_model_config: defaults of transformers") {
  for (const char* json : {R"({"model_type": "mamba"})",
                           R"({"model_type": "mamba", "hidden_size": null, "state_size": null,
                               "time_step_rank": null, "use_conv_bias": null, "expand": null})"}) {
    const ModelConfig config = parse_model_config(json);
    CHECK(config.d_model == 768);
    CHECK(config.layers.size() == 32);
    CHECK(config.vocab_size == 50280);
    CHECK(config.dstate == 16);
    CHECK(config.dim == 1536);
    CHECK(config.width == 4);
    CHECK(config.dt_rank == 48);
    CHECK(config.norm_eps == 1e-5f);
    CHECK_FALSE(config.use_bias);
    CHECK(config.use_conv_bias);
    CHECK(config.tie_embeddings);
    CHECK(config.eos_token_ids == std::vector<int64_t>{0});
  }
}

TEST_CASE("parse_model_config: derived sizes of transformers") {
  CHECK(parse_model_config(transformers_json("")).dt_rank == 3);  // ceil(40 / 16)
  CHECK(parse_model_config(transformers_json(R"("time_step_rank": "auto")")).dt_rank == 3);
  CHECK(parse_model_config(transformers_json(R"("expand": 1.53)")).dim == 61);
  // What is stored wins over expand.
  CHECK(parse_model_config(transformers_json(R"("intermediate_size": 72)")).dim == 72);
}

TEST_CASE("parse_model_config: end-of-sequence ids") {
  const auto ids = [](const std::string& value) {
    return parse_model_config(transformers_json(R"("vocab_size": 100, "eos_token_id": )" + value))
        .eos_token_ids;
  };
  CHECK(ids("99") == std::vector<int64_t>{99});
  CHECK(ids("null").empty());
  CHECK(ids("[]").empty());
  CHECK(ids("[-1, 5, 100, 18446744073709551615]") == std::vector<int64_t>{5});
  for (const char* value : {"\"0\"", "1.5", "[[1]]", "true", "{}", "[null]"}) {
    check_refused(transformers_json(R"("eos_token_id": )" + std::string(value)), "eos_token_id");
  }
}

TEST_CASE("parse_model_config: every field of the upstream package") {
  const ModelConfig config = parse_model_config(R"({
    "d_model": 48, "n_layer": 3, "vocab_size": 101, "pad_vocab_size_multiple": 16,
    "ssm_cfg": {"layer": "Mamba1", "d_state": 8, "d_conv": 3, "expand": 4, "dt_rank": 7,
                "conv_bias": false, "bias": true, "dt_min": 0.01, "dt_init": "random"},
    "rms_norm": true, "attn_layer_idx": [], "d_intermediate": 0, "tie_embeddings": false,
    "residual_in_fp32": true, "fused_add_norm": true, "eos_token_id": 4})");
  CHECK(config.format == CheckpointFormat::upstream);
  CHECK(config.model_type == "mamba");
  CHECK(config.d_model == 48);
  CHECK(config.layers.size() == 3);
  CHECK(config.vocab_size == 101);
  CHECK(config.padded_vocab_size == 112);
  CHECK(config.dstate == 8);
  CHECK(config.dim == 192);
  CHECK(config.width == 3);
  CHECK(config.dt_rank == 7);
  CHECK(config.norm_eps == 1e-5f);
  CHECK(config.use_bias);
  CHECK_FALSE(config.use_conv_bias);
  CHECK_FALSE(config.tie_embeddings);
  CHECK(config.eos_token_ids == std::vector<int64_t>{4});
}

TEST_CASE("parse_model_config: defaults of the upstream package") {
  const ModelConfig config = parse_model_config(upstream_json(R"("ssm_cfg": null)"));
  CHECK(config.layers.size() == 64);
  CHECK(config.vocab_size == 50277);
  CHECK(config.padded_vocab_size == 50280);
  CHECK(config.dim == 80);
  CHECK(config.dstate == 16);
  CHECK(config.width == 4);
  CHECK(config.dt_rank == 3);
  CHECK_FALSE(config.use_bias);
  CHECK(config.use_conv_bias);
  CHECK(config.tie_embeddings);
  CHECK(config.eos_token_ids.empty());
  CHECK(parse_model_config(upstream_json(R"("vocab_size": 256)")).padded_vocab_size == 256);
}

TEST_CASE("parse_model_config: what is not Mamba-1 is refused by name") {
  check_refused(R"({"model_type": "llama"})",
                "model_type: expected a known model type (known: "
                "mamba, falcon_mamba), got \"llama\"");
  check_refused("{}", "known: mamba");
  check_refused(transformers_json(R"("hidden_act": "gelu")"), "hidden_act");
  check_refused(upstream_json(R"("rms_norm": false)"), "LayerNorm");
  check_refused(upstream_json(R"("attn_layer_idx": [3])"), "attention");
  check_refused(upstream_json(R"("attn_layer_idx": 3)"), "attn_layer_idx");
  check_refused(upstream_json(R"("d_intermediate": 64)"), "d_intermediate");
  check_refused(upstream_json(R"("ssm_cfg": {"layer": "Mamba2"})"), "known: Mamba1");
  check_refused(upstream_json(R"("ssm_cfg": [])"), "ssm_cfg");
}

TEST_CASE("parse_model_config: sizes are positive integers within bounds") {
  for (const char* value : {"0", "-1", "1.5", "3.0", "1e3", "true", "\"8\"", "[8]", "{}",
                            "2147483648", "9223372036854775808", "18446744073709551617"}) {
    for (const char* name : {"num_hidden_layers", "vocab_size", "state_size", "conv_kernel",
                             "intermediate_size", "time_step_rank"}) {
      check_refused(transformers_json('"' + std::string(name) + "\": " + value), name);
    }
    check_refused(R"({"model_type": "mamba", "hidden_size": )" + std::string(value) + "}",
                  "hidden_size");
    check_refused(R"({"d_model": )" + std::string(value) + "}", "d_model");
    for (const char* name : {"d_state", "d_conv", "dt_rank"}) {
      check_refused(upstream_json(R"("ssm_cfg": {")" + std::string(name) + "\": " + value + "}"),
                    "ssm_cfg: " + std::string(name));
    }
  }
  for (const char* width : {"1", "9"}) {
    check_refused(transformers_json(R"("conv_kernel": )" + std::string(width)),
                  "from 2 to 8, got " + std::string(width));
  }
  for (const char* expand : {"0", "-2", "0.001", "1e30", "\"2\"", "Infinity"}) {
    check_refused(transformers_json(R"("expand": )" + std::string(expand)), "expand");
  }
  for (const char* eps : {"-1e-5", "NaN", "Infinity", "1e300", "\"1e-5\""}) {
    check_refused(transformers_json(R"("layer_norm_epsilon": )" + std::string(eps)),
                  "layer_norm_epsilon");
  }
  check_refused(transformers_json(R"("use_bias": 1)"), "use_bias: expected true or false, got 1");
}

TEST_CASE("parse_model_config: infinities and NaN, bare or as strings") {
  for (const char* value :
       {"[0.0, Infinity]", "[-Infinity,NaN]", R"(["Infinity", "-Infinity"])",
        R"([0.0, {"__float__": "Infinity"}])", R"("an \" Infinity, NaN \\")", "NaN"}) {
    CAPTURE(value);
    const ModelConfig config = parse_model_config(
        transformers_json(R"("time_step_limit": )" + std::string(value) + R"(, "state_size": 9)"));
    CHECK(config.dstate == 9);
  }
  // Inside a string the word is text.
  check_refused(R"({"model_type": "Infinity"})", R"(got "Infinity")");
  for (const char* value : {"1Infinity", "--Infinity", "InfinityNaN", "nan", "+Infinity", "Inf"}) {
    check_refused(transformers_json(R"("time_step_limit": )" + std::string(value)), "not valid");
  }
}

TEST_CASE("parse_model_config: text that is not a JSON object") {
  for (const char* json : {"", "{", "nonsense", R"({"model_type": "mamba"} trailing)",
                           "{\"model_type\": \"\xff\"}", R"({"a": "\)", R"({"a": 1e999})"}) {
    check_refused(json, "not valid JSON");
  }
  for (const char* json : {"[]", "3", "null", "\"mamba\"", "NaN"}) {
    check_refused(json, "expected a JSON object");
  }
  check_refused(std::string("{\"model_type\": \"mamba\"}\0x", 24), "zero byte");
  check_refused(transformers_json(R"("hidden_size": 8)"), "\"hidden_size\" occurs twice");
  for (const char* bracket : {"[", "{\"a\":"}) {
    std::string nested;
    for (int i = 0; i < 1'000'000; ++i) nested += bracket;
    check_refused(R"({"a": )" + nested, "nested deeper");
  }
  check_refused(std::string(17 << 20, ' '), "at most");
}

TEST_CASE("parse_model_config: messages are one short ASCII line") {
  const std::string message =
      refusal("{\"model_type\": \"\\n\xc3\xa9" + std::string(100'000, 'x') + "\"}");
  CHECK(message.size() < 300);
  for (const char c : message) CHECK((c >= ' ' && c <= '~'));
}

TEST_CASE("parse_model_config: a mutated configuration is refused or within bounds") {
  const std::string whole =
      transformers_json(R"("state_size": 16, "expand": 2, "conv_kernel": 4, "vocab_size": 256,
                           "time_step_rank": "auto", "time_step_limit": [0.0, Infinity])");
  std::mt19937 random(20240602);
  const auto below = [&](size_t n) {
    return std::uniform_int_distribution<size_t>(0, n - 1)(random);
  };
  const int rounds = num_mutants();
  int refused = 0, read = 0;
  for (int round = 0; round < rounds; ++round) {
    std::string json = whole;
    for (size_t edit = 0, edits = 1 + below(3); edit < edits && !json.empty(); ++edit) {
      const size_t at = below(json.size());
      switch (below(4)) {
        case 0:
          json[at] = static_cast<char>(below(256));
          break;
        case 1:
          json.insert(at, 1, "0123456789-.eE,:[]{}\" \\"[below(23)]);
          break;
        case 2:
          json.erase(at, 1 + below(4));
          break;
        default:
          json.replace(at, below(20), json.substr(below(json.size()), below(20)));
      }
    }
    try {
      const ModelConfig config = parse_model_config(json);
      REQUIRE(config.d_model >= 1);
      REQUIRE(config.dim >= 1);
      REQUIRE(config.dstate >= 1);
      REQUIRE(config.dt_rank >= 1);
      REQUIRE(config.width >= 2);
      REQUIRE(config.width <= 8);
      REQUIRE(config.padded_vocab_size >= config.vocab_size);
      ++read;
    } catch (const Error& error) {
      REQUIRE(error.code() == ErrorCode::invalid_checkpoint);
      ++refused;
    }
  }
  CHECK(read > 1'000);
  CHECK(refused > 5'000);
}
