// The decoder from C++, on the bundled checkpoint, on the CPU and on a GPU where there is one.
#include <doctest/doctest.h>

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "check_error.h"
#include "ssmcore/decoder.h"
#include "ssmcore/stream.h"

using namespace ssmcore;

namespace {

constexpr auto kInvalid = ErrorCode::invalid_argument;
const std::string kPrompt =
    "It is a truth universally acknowledged, that a single man in possession of";

std::string golden_text() {
  std::ifstream file(SSMCORE_TEST_DATA_DIR "/golden_mamba1_prose.txt", std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<int64_t> ids_of(const std::string& text) {
  return {text.begin(), text.end()};
}

std::vector<Device> devices() {
  std::vector<Device> all = {Device{}};
  if (cuda_device_count() > 0) all.push_back({DeviceType::cuda, 0});
  return all;
}

LoadOptions in_float32() {
  LoadOptions options;
  options.dtype = DType::float32;
  return options;
}

DecoderPrompt greedy(int32_t slot, const std::vector<int64_t>& ids) {
  DecoderPrompt prompt;
  prompt.slot = slot;
  prompt.token_ids = ids.data();
  prompt.length = static_cast<int64_t>(ids.size());
  prompt.settings.temperature = 0;
  return prompt;
}

}  // namespace

TEST_CASE("Decoder: a sequence that another joins says what it should") {
  for (const Device device : devices()) {
    CAPTURE(to_string(device));
    const Context context(device);
    const Stream stream(context);
    const LanguageModel model(open_checkpoint(SSMCORE_TEST_MODEL_DIR), context, in_float32());
    ModelState state = model.new_state(3, stream.handle());
    Decoder decoder(model, state, stream.handle());
    const std::vector<int64_t> ids = ids_of(kPrompt);
    std::string texts[2];
    const auto add = [&](const std::vector<int32_t>& slots) {
      const std::vector<int64_t> tokens = decoder.take();
      REQUIRE(tokens.size() == slots.size());
      for (size_t i = 0; i < slots.size(); ++i) texts[slots[i] / 2] += static_cast<char>(tokens[i]);
    };
    decoder.admit({greedy(2, ids)});
    add({2});
    for (int i = 1; i < 256; ++i) {
      std::vector<int32_t> slots = {2};
      if (i > 100) slots = {0, 2};
      if (i == 100) {
        decoder.admit({greedy(0, ids)});
        add({0});
      }
      decoder.step(slots);
      add(slots);
    }
    CHECK(texts[1] == golden_text());
    CHECK(texts[0] == golden_text().substr(0, texts[0].size()));
    CHECK(texts[0].size() == 156);
  }
}

TEST_CASE("Decoder: what it does not take") {
  for (const Device device : devices()) {
    CAPTURE(to_string(device));
    const Context context(device);
    const LanguageModel model(open_checkpoint(SSMCORE_TEST_MODEL_DIR), context, in_float32());
    ModelState state = model.new_state(2);
    Decoder decoder(model, state);
    const std::vector<int64_t> ids = ids_of("Emma"), none, bad = {256};
    check_error(kInvalid, "slots are missing", [&] { decoder.admit({}); });
    check_error(kInvalid, "slot 0 has no tokens", [&] { decoder.admit({greedy(0, none)}); });
    check_error(kInvalid, "256", [&] { decoder.admit({greedy(0, bad)}); });
    check_error(kInvalid, "slot is -1", [&] { decoder.admit({greedy(-1, ids)}); });
    check_error(kInvalid, "2 slots", [&] { decoder.step({2}); });
    check_error(kInvalid, "twice", [&] { decoder.step({1, 1}); });
    check_error(kInvalid, "got 3 rows", [&] { decoder.step({0, 1, 2}); });
    check_error(kInvalid, "no result", [&] { decoder.take(); });
    DecoderPrompt prompt = greedy(0, ids);
    prompt.settings.top_p = 0;
    check_error(kInvalid, "top_p", [&] { decoder.admit({prompt}); });
    decoder.admit({greedy(0, ids)});
    decoder.step({0});
    check_error(kInvalid, "two results", [&] { decoder.step({0}); });
    CHECK(decoder.take().size() == 1);
  }
}
