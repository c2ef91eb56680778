// The language model from C++, on the bundled checkpoint.
#include <doctest/doctest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "check_error.h"
#include "ssmcore/language_model.h"

using namespace ssmcore;

namespace {

constexpr auto kInvalid = ErrorCode::invalid_argument;
const std::string kPrompt =
    "It is a truth universally acknowledged, that a single man in possession of";

std::string golden_text() {
  std::ifstream file(SSMCORE_TEST_DATA_DIR "/golden_mamba1_prose.txt", std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// One context and model for all tests.
struct Fixture {
  Context context;
  LanguageModel model{open_checkpoint(SSMCORE_TEST_MODEL_DIR), context};
  int64_t vocab_size = model.config().vocab_size;
};

Fixture& fixture() {
  static Fixture fixture;
  return fixture;
}

// Feeds rows of bytes of one length, each in the slot that `slots` names (none: its own), and
// returns the logits of the last positions, row after row.
std::vector<float> forward(ModelState& state, const std::vector<std::string>& rows,
                           const std::vector<int32_t>& slots = {}) {
  const auto& [context, model, vocab_size] = fixture();
  const int64_t batch = rows.size(), seqlen = rows.front().size();
  std::vector<int64_t> ids;
  for (const std::string& row : rows)
    for (const unsigned char byte : row) ids.push_back(byte);
  std::vector<float> logits(batch * vocab_size);
  LanguageModelFwdArgs args;
  args.token_ids = TensorView(ids.data(), DType::int64, {batch, seqlen});
  args.state = &state;
  if (!slots.empty())
    args.state_indices =
        TensorView(const_cast<int32_t*>(slots.data()), DType::int32, {int64_t(slots.size())});
  args.logits = TensorView(logits.data(), DType::float32, {batch, vocab_size});
  const Buffer workspace(context.allocator(), model.workspace_size(batch, seqlen, context),
                         "a test");
  model.forward(args, {context, nullptr, workspace.data(), workspace.bytes()});
  return logits;
}

// The likeliest byte of row `row`.
char greedy(const std::vector<float>& logits, int64_t row = 0) {
  const auto begin = logits.begin() + row * fixture().vocab_size;
  return static_cast<char>(std::max_element(begin, begin + fixture().vocab_size) - begin);
}

}  // namespace

TEST_CASE("LanguageModel: the greedy continuation is the golden one") {
  const std::string golden = golden_text();
  REQUIRE(golden.size() == 256);
  // The prompt at once, in two pieces, and byte by byte.
  for (const size_t split : {kPrompt.size(), size_t{31}, size_t{1}}) {
    ModelState state = fixture().model.new_state(1);
    std::vector<float> logits;
    for (size_t at = 0; at < kPrompt.size(); at += split)
      logits = forward(state, {kPrompt.substr(at, split)});
    std::string text;
    while (text.size() < golden.size()) {
      text += greedy(logits);
      logits = forward(state, {text.substr(text.size() - 1)});
    }
    CHECK(text == golden);
  }
}

TEST_CASE("LanguageModel: a row's slot carries it, whatever shares the batch") {
  const std::string golden = golden_text();
  const int64_t vocab_size = fixture().vocab_size;
  ModelState state = fixture().model.new_state(3);
  // Another text in slots 0 and 1 leaves slot 2 alone.
  const std::string other(kPrompt.size(), 'x');
  forward(state, {kPrompt, other}, {2, 0});
  forward(state, {other}, {1});
  std::string text = golden.substr(0, 20);
  std::vector<float> logits = forward(state, {other.substr(0, 20), text}, {1, 2});
  while (text.size() < 60) {
    text += greedy(logits, 1);
    logits = forward(state, {"y", text.substr(text.size() - 1)}, {0, 2});
  }
  CHECK(text == golden.substr(0, 60));

  // Copied, the sequence goes on from the copy; reset, the slot is as new.
  state.copy_slot(2, 0);
  const std::vector<float> original = forward(state, {" "}, {2});
  CHECK(forward(state, {" "}, {0}) == original);
  state.reset_slot(0);
  ModelState fresh = fixture().model.new_state(1);
  CHECK(forward(state, {kPrompt}, {0}) == forward(fresh, {kPrompt}));
  CHECK(original.size() == static_cast<size_t>(vocab_size));

  check_error(kInvalid, "slot", [&] { state.reset_slot(3); });
  check_error(kInvalid, "from", [&] { state.copy_slot(-1, 0); });
  check_error(kInvalid, "to", [&] { state.copy_slot(0, 3); });
}

TEST_CASE("LanguageModel: one thread and several give the same bits") {
  ModelState state = fixture().model.new_state(1);
  const std::vector<float> before = forward(state, {kPrompt});
  const int threads = fixture().context.num_threads();
  for (const int n : {1, 3, 8}) {
    fixture().context.set_num_threads(n);
    state.reset_slot(0);
    CHECK(forward(state, {kPrompt}) == before);
  }
  fixture().context.set_num_threads(threads);
}

TEST_CASE("LanguageModel: threads share it, each with its own state") {
  const int num_threads = fixture().context.num_threads();
  fixture().context.set_num_threads(2);  // for the callers to share
  std::string texts[2];
  const auto generate = [](std::string* text) {
    ModelState state = fixture().model.new_state(1);
    std::vector<float> logits = forward(state, {kPrompt});
    for (int i = 0; i < 20; ++i) {
      *text += greedy(logits);
      logits = forward(state, {text->substr(text->size() - 1)});
    }
  };
  std::vector<std::thread> threads;
  for (std::string& text : texts) threads.emplace_back(generate, &text);
  for (std::thread& thread : threads) thread.join();
  for (const std::string& text : texts) CHECK(text == golden_text().substr(0, 20));
  fixture().context.set_num_threads(num_threads);
}

TEST_CASE("LanguageModel: what forward refuses, leaving the state as it was") {
  const Context& context = fixture().context;
  const LanguageModel& model = fixture().model;
  const int64_t vocab_size = fixture().vocab_size;
  ModelState state = model.new_state(1), two = model.new_state(2);
  const LanguageModel twin(open_checkpoint(SSMCORE_TEST_MODEL_DIR), context);
  ModelState foreign = twin.new_state(1);
  int32_t ids[] = {'a', 'b'};
  std::vector<float> logits(2 * vocab_size);
  const size_t needed = model.workspace_size(1, 2, context);
  const Buffer workspace(context.allocator(), needed, "a test");

  LanguageModelFwdArgs valid;
  valid.token_ids = TensorView(ids, DType::int32, {1, 2});
  valid.state = &state;
  valid.logits = TensorView(logits.data(), DType::float32, {1, 2, vocab_size});
  const auto run = [&](const LanguageModelFwdArgs& args, size_t bytes) {
    model.forward(args, {context, nullptr, workspace.data(), bytes});
  };
  const auto check_refused = [&](const std::string& expected, auto spoil) {
    LanguageModelFwdArgs args = valid;
    spoil(args);
    check_error(kInvalid, "language_model: " + expected, [&] { run(args, needed); });
  };

  check_refused("token_ids is missing", [](auto& args) { args.token_ids = TensorView(); });
  check_refused("token_ids has shape (1, 0)", [](auto& args) { args.token_ids.shape[1] = 0; });
  check_refused("state is missing", [](auto& args) { args.state = nullptr; });
  check_refused("state was made by another model", [&](auto& args) { args.state = &foreign; });
  check_refused("state has 2 slots", [&](auto& args) { args.state = &two; });
  check_refused("logits has vocab_size", [&](auto& args) { args.logits.shape[2] = 255; });
  ids[1] = 256;
  check_refused("token_ids holds 256 at position 1, expected 0 to 255", [](auto&) {});
  ids[1] = 'b';
  check_error(
      kInvalid,
      "workspace has " + std::to_string(needed - 1) + " bytes, expected " + std::to_string(needed),
      [&] { run(valid, needed - 1); });

  // None of these touched the state: the call gives what it gives from a new one.
  run(valid, needed);
  const std::vector<float> after_refusals = logits;
  ModelState fresh = model.new_state(1);
  valid.state = &fresh;
  run(valid, needed);
  CHECK(logits == after_refusals);
  // And what the last position alone gives, up to rounding: other numbers of rows add in other
  // orders.
  ModelState another = model.new_state(1);
  const std::vector<float> last = forward(another, {"ab"});
  for (int64_t i = 0; i < vocab_size; ++i)
    CHECK(last[i] == doctest::Approx(logits[vocab_size + i]).epsilon(1e-4));
}

TEST_CASE("LanguageModel: loading names what is missing, misshapen or of no use") {
  const Context& context = fixture().context;
  const Checkpoint whole = open_checkpoint(SSMCORE_TEST_MODEL_DIR);
  const std::string name = "backbone.layers.3.mixer.x_proj.weight";
  Checkpoint lacking = whole;
  lacking.tensors.tensors.erase(name);
  check_error(ErrorCode::invalid_checkpoint, name, [&] { LanguageModel(lacking, context); });
  Checkpoint misshapen = whole;
  misshapen.tensors.tensors.at(name).shape[0] -= 1;
  check_error(ErrorCode::invalid_checkpoint, name, [&] { LanguageModel(misshapen, context); });
  check_error(kInvalid, "dtype is int64",
              [&] { LanguageModel(whole, context, LoadOptions{DType::int64}); });
  check_error(kInvalid, "num_slots is 0", [] { fixture().model.new_state(0); });
}

TEST_CASE("LanguageModel: a step down the gradients lowers the loss") {
  const Context& context = fixture().context;
  LoadOptions options;
  options.trainable = true;
  LanguageModel model(open_checkpoint(SSMCORE_TEST_MODEL_DIR), context, options);
  std::vector<int64_t> ids(kPrompt.begin(), kPrompt.end());
  const int64_t seqlen = static_cast<int64_t>(ids.size()) - 1;
  float loss = 0;
  LanguageModelTrainArgs args;
  args.token_ids = TensorView(ids.data(), DType::int64, {1, seqlen});
  args.targets = TensorView(ids.data() + 1, DType::int64, {1, seqlen});
  args.loss = TensorView(&loss, DType::float32, {1});
  std::vector<std::vector<float>> memory;
  for (const auto& [name, parameter] : model.parameters()) {
    memory.emplace_back(parameter.numel());
    args.gradients[name].tensor = parameter;
    args.gradients[name].tensor.data = memory.back().data();
  }
  const size_t needed = model.loss_and_gradients_workspace_size(args, context);
  const Buffer workspace(context.allocator(), needed, "a test");
  const auto step = [&](size_t bytes) {
    model.loss_and_gradients(args, {context, nullptr, workspace.data(), bytes});
    return loss;
  };
  const float before = step(needed);
  for (const auto& [name, gradient] : args.gradients)
    for (int64_t i = 0; i < gradient.tensor.numel(); ++i)
      model.parameters().at(name).as<float>()[i] -= 0.02f * gradient.tensor.as<float>()[i];
  model.refresh();
  CHECK(step(needed) < 0.8f * before);

  // Computed again, layers need less memory, and give the same.
  const float kept = step(needed);
  args.recompute_layers = true;
  const size_t less = model.loss_and_gradients_workspace_size(args, context);
  CHECK(less < needed / 2);
  CHECK(step(less) == kept);
  check_error(kInvalid, "workspace", [&] { step(less - 1); });
  args.gradients["no.such"];
  check_error(kInvalid, "no.such", [&] { step(less); });
}
