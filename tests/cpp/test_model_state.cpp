// ModelState: copies, bytes and back; packed sequences that end up in it.
#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "check_error.h"
#include "ssmcore/language_model.h"

using namespace ssmcore;

namespace {

constexpr auto kInvalid = ErrorCode::invalid_argument;
constexpr int64_t kVocabSize = 256;

struct Fixture {
  Context context;
  LanguageModel model{open_checkpoint(SSMCORE_TEST_MODEL_DIR), context};
};

Fixture& fixture() {
  static Fixture fixture;
  return fixture;
}

// Feeds texts of any lengths, packed, and returns the logits of their last positions.
std::vector<float> feed(ModelState& state, const std::vector<std::string>& texts,
                        std::vector<int32_t> slots) {
  auto& [context, model] = fixture();
  std::vector<int32_t> ids, cu_seqlens = {0};
  for (const std::string& text : texts) {
    for (const unsigned char byte : text) ids.push_back(byte);
    cu_seqlens.push_back(static_cast<int32_t>(ids.size()));
  }
  const int64_t rows = static_cast<int64_t>(texts.size());
  const int64_t seqlen = static_cast<int64_t>(ids.size());
  std::vector<float> logits(static_cast<size_t>(rows * kVocabSize));
  LanguageModelFwdArgs args;
  args.token_ids = TensorView(ids.data(), DType::int32, {1, seqlen});
  args.cu_seqlens = TensorView(cu_seqlens.data(), DType::int32, {rows + 1});
  args.state = &state;
  args.state_indices = TensorView(slots.data(), DType::int32, {rows});
  args.logits = TensorView(logits.data(), DType::float32, {rows, kVocabSize});
  const Buffer workspace(context.allocator(), model.workspace_size(1, seqlen, context), "a test");
  model.forward(args, {context, nullptr, workspace.data(), workspace.bytes()});
  return logits;
}

}  // namespace

TEST_CASE("ModelState: packed texts leave what each alone does") {
  const std::string longer(600, 'x');  // cut by a chunk
  ModelState packed = fixture().model.new_state(3), apart = fixture().model.new_state(3);
  const std::vector<float> logits = feed(packed, {"Emma", longer, "y"}, {2, 0, 1});
  std::vector<float> expected = feed(apart, {"Emma"}, {2});
  for (const auto& [text, slot] : {std::pair{longer, 0}, {std::string("y"), 1}}) {
    const std::vector<float> more = feed(apart, {text}, {slot});
    expected.insert(expected.end(), more.begin(), more.end());
  }
  REQUIRE(logits.size() == expected.size());
  for (size_t i = 0; i < logits.size(); ++i)
    CHECK(logits[i] == doctest::Approx(expected[i]).epsilon(1e-4));
}

TEST_CASE("ModelState: clone and bytes are the same state") {
  ModelState state = fixture().model.new_state(2);
  CHECK(state.is_at_start(0));
  feed(state, {"It is a truth"}, {0});
  CHECK_FALSE(state.is_at_start(0));
  CHECK(state.is_at_start(1));
  const std::string bytes = state.save();
  CHECK(bytes.size() > state.nbytes());
  ModelState clone = state.clone(), loaded = fixture().model.new_state(2);
  loaded.load(bytes);
  const std::vector<float> expected = feed(state, {" universally"}, {0});
  CHECK(state.save() != bytes);
  CHECK(clone.save() == bytes);
  CHECK(feed(clone, {" universally"}, {0}) == expected);
  CHECK(feed(loaded, {" universally"}, {0}) == expected);

  check_error(kInvalid, "slot is 2", [&] { state.is_at_start(2); });
}

TEST_CASE("ModelState: bytes of anything else are refused and change nothing") {
  ModelState state = fixture().model.new_state(1);
  feed(state, {"Emma"}, {0});
  const std::string bytes = state.save();
  const auto refuse = [&](const std::string& bad, const std::string& expected) {
    check_error(kInvalid, expected, [&] { state.load(bad); });
    CHECK(state.save() == bytes);
  };
  refuse("", "expected a saved state");
  refuse(bytes.substr(1), "expected a saved state");
  refuse(bytes + "x", "bytes, expected");
  refuse(fixture().model.new_state(2).save(), "(2, 3, 512)");
  for (size_t size = 0; size < bytes.size(); size += size < 1000 ? 1 : 1009)
    refuse(bytes.substr(0, size), "model_state: ");
  std::string other = bytes;
  for (size_t i = 0; i < 400; ++i) {
    other[i] = static_cast<char>(bytes[i] ^ 0x80);  // no text any longer
    refuse(other, "model_state: ");
    other[i] = bytes[i];
  }
}
