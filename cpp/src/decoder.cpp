#include "ssmcore/decoder.h"

#include <algorithm>
#include <string>

#include "checks.h"
#include "cuda_backend.h"
#include "decoder_params.h"
#include "kernels.h"
#include "memory.h"
#include "scratch.h"
#include "ssmcore/error.h"
#include "ssmcore/sample.h"

namespace ssmcore {
namespace {

constexpr const char* kOp = "decoder";
constexpr size_t kMaxResults = 2;  // that wait to be taken

// Field `member` of an array of rows.
template <typename T>
TensorView field(DecoderRow* rows, T DecoderRow::* member, DType dtype, int64_t count,
                 Device device) {
  static_assert(sizeof(DecoderRow) % sizeof(T) == 0);
  return TensorView(&(rows->*member), dtype, {count}, {sizeof(DecoderRow) / sizeof(T)}, device);
}

SampleArgs sample_args(DecoderRow* rows, int64_t count, Device device) {
  SampleArgs args;
  args.repetition_penalty =
      field(rows, &DecoderRow::repetition_penalty, DType::float32, count, device);
  args.temperature = field(rows, &DecoderRow::temperature, DType::float32, count, device);
  args.top_k = field(rows, &DecoderRow::top_k, DType::int32, count, device);
  args.top_p = field(rows, &DecoderRow::top_p, DType::float32, count, device);
  args.min_p = field(rows, &DecoderRow::min_p, DType::float32, count, device);
  args.seed = field(rows, &DecoderRow::seed, DType::int64, count, device);
  args.position = field(rows, &DecoderRow::position, DType::int64, count, device);
  args.out = field(rows, &DecoderRow::token_id, DType::int64, count, device);
  return args;
}

DecoderRow first_row(const DecoderPrompt& prompt) {
  const SamplingSettings& s = prompt.settings;
  DecoderRow row = kNoDecoderRow;
  row.seed = s.seed;
  row.temperature = s.temperature;
  row.top_p = s.top_p;
  row.min_p = s.min_p;
  row.repetition_penalty = s.repetition_penalty;
  row.top_k = s.top_k;
  row.history_length = static_cast<int32_t>(prompt.length);
  return row;
}

}  // namespace

// Tokens on their way: of so many rows, in this one of the two places.
struct Decoder::Result {
  int64_t rows;
  size_t place;
};

Decoder::Decoder(const LanguageModel& model, ModelState& state, void* stream,
                 const DecoderOptions& options)
    : model_(model),
      state_(state),
      context_(model.context()),
      stream_(stream),
      options_(options),
      is_on_gpu_(context_.device().type == DeviceType::cuda),
      max_rows_(padded(state.num_slots())),
      history_lengths_(static_cast<size_t>(state.num_slots())) {
  const size_t rows = static_cast<size_t>(max_rows_);
  const auto place = [&](Scratch scratch) {
    by_slot_ = static_cast<DecoderRow*>(scratch.bytes(rows * sizeof(DecoderRow)));
    of_step_ = static_cast<DecoderRow*>(scratch.bytes(rows * sizeof(DecoderRow)));
    slots_ = static_cast<int32_t*>(scratch.bytes(rows * sizeof(int32_t)));
    num_drawn_ = static_cast<uint64_t*>(scratch.bytes(sizeof(uint64_t)));
    logits_ = scratch.floats(max_rows_ * model.config().vocab_size);
    return scratch.used();
  };
  memory_ = Buffer(context_.allocator(), place(Scratch::nowhere()), "a decoder's rows and logits",
                   stream_);
  place(Scratch(memory_.data()));
  zero_bytes(context_, num_drawn_, sizeof(uint64_t), stream_);
  if (is_on_gpu_) {
    drawn_ = std::static_pointer_cast<int64_t>(
        cuda::make_host_memory(context_.cuda(), 2 * rows * sizeof(int64_t)));
    for (auto& event : events_) event = cuda::make_event(context_.cuda());
  } else {
    drawn_ = std::shared_ptr<int64_t>(new int64_t[2 * rows], std::default_delete<int64_t[]>());
  }
}

Decoder::~Decoder() {
  try {
    context_.synchronize(stream_);  // what has not been taken is still being written
  } catch (const Error&) {
    // The device has failed, and whoever uses it next learns of that.
  }
}

// Graphs are for few numbers of rows; the rows beyond those asked for have no slot.
int64_t Decoder::padded(int64_t rows) const {
  if (!is_on_gpu_ || rows <= 8) return rows;
  const int64_t multiple = rows <= 64 ? 8 : 32;
  return (rows + multiple - 1) / multiple * multiple;
}

void Decoder::check_slots(const std::vector<int32_t>& slots) const {
  const Checks check(kOp, {});
  check.require(!slots.empty(), [] { return std::string("slots are missing"); });
  const int64_t count = static_cast<int64_t>(slots.size());
  check.require(count <= state_.num_slots(), [&] {
    return "got " + std::to_string(count) + " rows, the state has " +
           std::to_string(state_.num_slots()) + " slots";
  });
  const auto smallest = std::min_element(slots.begin(), slots.end());
  check.require(*smallest >= 0,
                [&] { return "slot is " + std::to_string(*smallest) + ", expected at least 0"; });
  const TensorView view(const_cast<int32_t*>(slots.data()), DType::int32, {count});
  check.state_indices(view, count, state_.num_slots());
}

void Decoder::check_admitted(const std::vector<int32_t>& slots) const {
  check_slots(slots);
  for (const int32_t slot : slots)
    Checks(kOp, {}).require(history_lengths_[static_cast<size_t>(slot)] > 0, [&] {
      return "slot " + std::to_string(slot) + " has no sequence: none was admitted to it";
    });
}

void Decoder::set_slots(const std::vector<int32_t>& slots, int64_t rows) {
  std::vector<int32_t> all = slots;
  all.resize(static_cast<size_t>(rows), -1);
  if (all == set_slots_) return;
  copy_bytes(context_, slots_, all.data(), all.size() * sizeof(int32_t), stream_);
  set_slots_ = std::move(all);
}

void Decoder::reserve_workspace(size_t bytes) {
  if (bytes <= workspace_.bytes()) return;
  graphs_.clear();
  workspace_ = Buffer();
  workspace_ = Buffer(context_.allocator(), bytes, "a decoder's step", stream_);
}

// Room for so many ids a slot, and what was there.
void Decoder::reserve_history(int64_t length) {
  if (length <= history_capacity_) return;
  const int64_t capacity = std::max<int64_t>({length, 2 * history_capacity_, 256});
  const size_t bytes = Scratch::product(static_cast<size_t>(capacity), sizeof(int32_t));
  const size_t rows = static_cast<size_t>(max_rows_);
  Buffer history(context_.allocator(), Scratch::product(bytes, 2 * rows),
                 "the ids that a repetition penalty looks at", stream_);
  const std::vector<int32_t> nothing(static_cast<size_t>(capacity), -1);
  for (size_t slot = 0; slot < rows; ++slot) {
    char* to = static_cast<char*>(history.data()) + slot * bytes;
    const size_t before = static_cast<size_t>(history_capacity_) * sizeof(int32_t);
    copy_bytes(context_, to, nothing.data(), bytes, stream_);
    if (before > 0)
      copy_bytes(context_, to, static_cast<char*>(history_.data()) + slot * before, before,
                 stream_);
  }
  graphs_.clear();
  history_ = std::move(history);
  history_capacity_ = capacity;
}

void Decoder::write_history(const DecoderPrompt& prompt) {
  std::vector<int32_t> ids(static_cast<size_t>(history_capacity_), -1);
  std::transform(prompt.token_ids, prompt.token_ids + prompt.length, ids.begin(),
                 [](int64_t id) { return static_cast<int32_t>(id); });
  copy_bytes(context_, static_cast<int32_t*>(history_.data()) + prompt.slot * history_capacity_,
             ids.data(), ids.size() * sizeof(int32_t), stream_);
}

DecoderRowsParams Decoder::rows_params(int64_t rows) const {
  DecoderRowsParams p{};
  p.rows = rows;
  p.max_rows = max_rows_;
  p.slots = slots_;
  p.by_slot = by_slot_;
  p.of_step = of_step_;
  p.history_capacity = history_capacity_;
  p.history_by_slot = static_cast<int32_t*>(history_.data());
  p.history_of_step = p.history_by_slot + max_rows_ * history_capacity_;
  p.drawn = drawn_.get();
  p.num_drawn = num_drawn_;
  return p;
}

void Decoder::feed(int64_t rows, bool draws, void* stream) {
  const Exec exec{context_, stream, workspace_.data(), workspace_.bytes()};
  const KernelTable& kernels = kernel_table(context_);
  launch(kOp, kernels.decoder_gather, rows_params(rows), exec);
  const Device device = context_.device();
  LanguageModelFwdArgs args;
  args.token_ids = field(of_step_, &DecoderRow::token_id, DType::int64, rows, device).unsqueeze(1);
  args.state = &state_;
  args.state_indices = TensorView(slots_, DType::int32, {rows}, device);
  if (draws)
    args.logits = TensorView(logits_, DType::float32, {rows, model_.config().vocab_size}, device);
  model_.forward(args, exec);
  if (draws) draw(rows, stream);
}

void Decoder::draw(int64_t rows, void* stream) {
  const Exec exec{context_, stream, workspace_.data(), workspace_.bytes()};
  const Device device = context_.device();
  SampleArgs args = sample_args(of_step_, rows, device);
  args.logits = TensorView(logits_, DType::float32, {rows, model_.config().vocab_size}, device);
  const DecoderRowsParams p = rows_params(rows);
  if (p.history_capacity > 0)
    args.history = TensorView(p.history_of_step, DType::int32, {rows, p.history_capacity}, device);
  sample(args, exec);
  launch(kOp, kernel_table(context_).decoder_scatter, p, exec);
}

void Decoder::add_result(int64_t rows) {
  const size_t place = num_results_++ % 2;
  if (is_on_gpu_) cuda::record_event(context_.cuda(), events_[place].get(), stream_);
  results_.push_back({rows, place});
}

void Decoder::admit(const std::vector<DecoderPrompt>& prompts) {
  const Checks check(kOp, {});
  std::vector<int32_t> slots, cu_seqlens = {0};
  std::vector<int64_t> token_ids;
  std::vector<DecoderRow> rows;
  for (const DecoderPrompt& prompt : prompts) {
    check.require(prompt.length > 0, [&] {
      return "the prompt for slot " + std::to_string(prompt.slot) + " has no tokens";
    });
    slots.push_back(prompt.slot);
    token_ids.insert(token_ids.end(), prompt.token_ids, prompt.token_ids + prompt.length);
    check.range("tokens of all prompts", static_cast<int64_t>(token_ids.size()), 1, INT32_MAX);
    cu_seqlens.push_back(static_cast<int32_t>(token_ids.size()));
    rows.push_back(first_row(prompt));
  }
  check_slots(slots);
  const int64_t count = static_cast<int64_t>(rows.size());
  check_sample_settings(sample_args(rows.data(), count, {}));
  check.require(results_.size() < kMaxResults,
                [] { return std::string("two results wait to be taken"); });

  bool has_penalty = history_capacity_ > 0;
  for (const DecoderPrompt& prompt : prompts)
    has_penalty = has_penalty || prompt.settings.repetition_penalty != 1;
  int64_t longest = 0;
  for (const DecoderPrompt& prompt : prompts) longest = std::max(longest, prompt.length + 1);
  if (has_penalty) reserve_history(longest);

  LanguageModelFwdArgs args;
  args.token_ids =
      TensorView(token_ids.data(), DType::int64, {1, static_cast<int64_t>(token_ids.size())});
  args.state = &state_;
  args.state_indices = TensorView(slots.data(), DType::int32, {count});
  if (count > 1) args.cu_seqlens = TensorView(cu_seqlens.data(), DType::int32, {count + 1});
  args.logits =
      TensorView(logits_, DType::float32, {count, model_.config().vocab_size}, context_.device());
  const size_t bytes = model_.workspace_size(1, args.token_ids.shape[1], context_);
  const Buffer workspace(context_.allocator(), bytes, "reading prompts", stream_);
  SampleArgs draws = sample_args(of_step_, count, context_.device());
  draws.logits = args.logits;
  reserve_workspace(sample_workspace_size(draws, context_));
  model_.forward(args, {context_, stream_, workspace.data(), workspace.bytes()});

  for (size_t i = 0; i < rows.size(); ++i) {
    const DecoderPrompt& prompt = prompts[i];
    copy_bytes(context_, by_slot_ + prompt.slot, &rows[i], sizeof rows[i], stream_);
    if (history_capacity_ > 0) write_history(prompt);
    history_lengths_[static_cast<size_t>(prompt.slot)] = prompt.length + 1;
  }
  set_slots(slots, count);
  launch(kOp, kernel_table(context_).decoder_gather, rows_params(count), {context_, stream_});
  draw(count, stream_);
  add_result(count);
}

void Decoder::step(const std::vector<int32_t>& slots) {
  check_admitted(slots);
  Checks(kOp, {}).require(results_.size() < kMaxResults,
                          [] { return std::string("two results wait to be taken"); });
  const int64_t rows = padded(static_cast<int64_t>(slots.size()));
  int64_t longest = 0;
  for (const int32_t slot : slots)
    longest = std::max(longest, history_lengths_[static_cast<size_t>(slot)] + 1);
  if (history_capacity_ > 0) reserve_history(longest);
  SampleArgs draws = sample_args(of_step_, rows, context_.device());
  draws.logits =
      TensorView(logits_, DType::float32, {rows, model_.config().vocab_size}, context_.device());
  reserve_workspace(
      std::max(model_.workspace_size(rows, 1, context_), sample_workspace_size(draws, context_)));
  for (const int32_t slot : slots) ++history_lengths_[static_cast<size_t>(slot)];
  set_slots(slots, rows);
  if (!is_on_gpu_ || options_.without_graphs || known_rows_.insert(rows).second) {
    feed(rows, true, stream_);
  } else {
    std::shared_ptr<void>& graph = graphs_[rows];
    if (!graph)
      graph = cuda::capture(context_.cuda(), "decoder: the graph of a step",
                            [&](void* stream) { feed(rows, true, stream); });
    cuda::launch_graph(context_.cuda(), graph.get(), stream_);
  }
  add_result(static_cast<int64_t>(slots.size()));
}

void Decoder::read(const std::vector<int32_t>& slots) {
  check_admitted(slots);
  const int64_t rows = static_cast<int64_t>(slots.size());
  reserve_workspace(model_.workspace_size(rows, 1, context_));
  set_slots(slots, rows);
  feed(rows, false, stream_);
}

std::vector<int64_t> Decoder::take() {
  Checks(kOp, {}).require(!results_.empty(),
                          [] { return std::string("no result waits to be taken"); });
  const Result result = results_.front();
  if (is_on_gpu_) cuda::wait_for_event(context_.cuda(), events_[result.place].get());
  results_.pop_front();
  const int64_t* tokens = drawn_.get() + static_cast<int64_t>(result.place) * max_rows_;
  return {tokens, tokens + result.rows};
}

}  // namespace ssmcore
