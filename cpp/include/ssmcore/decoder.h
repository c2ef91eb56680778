// Decoding: sequences that go on together, one drawn token a step, and join and leave in between.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "ssmcore/language_model.h"

namespace ssmcore {

struct DecoderRow;
struct DecoderRowsParams;

// How a sequence's tokens are drawn; see sample.h.
struct SamplingSettings {
  float temperature = 1.0f;
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;  // over the prompt and what has been drawn
  int64_t seed = 0;
};

// A sequence that joins: its slot, what it reads first, and how it goes on.
struct DecoderPrompt {
  int32_t slot = 0;
  const int64_t* token_ids = nullptr;
  int64_t length = 0;  // ≥ 1
  SamplingSettings settings;
};

struct DecoderOptions {
  // On a GPU: every step launch by launch. Otherwise a number of rows that comes for the second
  // time runs as one graph.
  bool without_graphs = false;
};

// Feeds the sequences in the slots of a state the tokens that it draws for them. Each has its own
// settings and draws by its own seed and count, so that its tokens do not depend on the others.
//
// On a GPU everything is in the order of one stream, and nothing waits but take(): tokens stay on
// the device, and a step may be launched before those of the step before have been taken.
//
// The state, and through it the model, must outlive it. One thread may use it at a time.
class Decoder {
 public:
  Decoder(const LanguageModel& model, ModelState& state, void* stream = nullptr,
          const DecoderOptions& options = {});
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // Whether step() returns before it is done, so that the next one may well be launched before
  // take(): on a GPU.
  bool runs_ahead() const { return is_on_gpu_; }

  // Reads prompts, in one pass, each going on from what its slot has read, and draws the token that
  // follows each. Throws Error(invalid_argument) for settings out of range, a prompt of no tokens
  // or with ids out of range, a slot that is out of range or comes twice, and where two results
  // wait to be taken; Error(out_of_memory) names what for.
  void admit(const std::vector<DecoderPrompt>& prompts);
  // Feeds the sequences in these slots their last token and draws the next. Throws
  // Error(invalid_argument) for a slot that nothing was admitted to, and as admit() does.
  void step(const std::vector<int32_t>& slots);
  // Feeds them their last token, and draws nothing: so that the state has read all.
  void read(const std::vector<int32_t>& slots);
  // Waits for the earliest admit() or step() whose tokens have not been taken, and returns them,
  // one for each of its sequences. Throws as Context::synchronize does.
  std::vector<int64_t> take();

 private:
  struct Result;

  void check_slots(const std::vector<int32_t>& slots) const;
  void check_admitted(const std::vector<int32_t>& slots) const;
  void set_slots(const std::vector<int32_t>& slots, int64_t rows);
  int64_t padded(int64_t rows) const;
  void reserve_workspace(size_t bytes);
  void reserve_history(int64_t length);
  void write_history(const DecoderPrompt& prompt);
  DecoderRowsParams rows_params(int64_t rows) const;
  // Feeds the rows in set_slots() their last tokens, and with `draws` draws the next.
  void feed(int64_t rows, bool draws, void* stream);
  // Draws from the logits.
  void draw(int64_t rows, void* stream);
  void add_result(int64_t rows);

  const LanguageModel& model_;
  ModelState& state_;
  const Context& context_;
  void* stream_;
  DecoderOptions options_;
  bool is_on_gpu_;
  int64_t max_rows_;

  Buffer memory_, workspace_, history_;
  DecoderRow* by_slot_ = nullptr;   // on the device, as is what follows
  DecoderRow* of_step_ = nullptr;   // (max_rows): copies
  int32_t* slots_ = nullptr;        // (max_rows)
  uint64_t* num_drawn_ = nullptr;   // results so far
  float* logits_ = nullptr;         // (max_rows, vocab_size)
  int64_t history_capacity_ = 0;    // ids a slot; 0: no penalty so far
  std::vector<int32_t> set_slots_;  // what slots_ holds

  std::vector<int64_t> history_lengths_;  // by slot
  std::shared_ptr<int64_t> drawn_;        // (2, max_rows), which the device writes in turns
  std::shared_ptr<void> events_[2];
  uint64_t num_results_ = 0;
  std::deque<Result> results_;  // not taken yet

  std::set<int64_t> known_rows_;  // numbers of rows that have come
  std::map<int64_t, std::shared_ptr<void>> graphs_;
};

}  // namespace ssmcore
