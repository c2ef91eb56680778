#include "ssmcore/language_model.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "checks.h"
#include "kernels.h"
#include "language_model_parts.h"
#include "memory.h"
#include "scratch.h"
#include "ssmcore/embedding.h"
#include "ssmcore/error.h"
#include "ssmcore/linear.h"
#include "ssmcore/rms_norm.h"
#include "weight_loader.h"

namespace ssmcore {
namespace {

// Tokens, over all rows, that one pass through the layers takes: enough for matrix products (and on
// a GPU scans) to be efficient, few enough for memory to stay small.
constexpr int64_t kChunkTokens = 512, kGpuChunkTokens = 8192;
// Last positions of packed sequences that go through the head at a time.
constexpr int64_t kLastPositions = 64;

bool is_gpu(const Context& context) {
  return context.device().type == DeviceType::cuda;
}

int64_t chunk_length(int64_t batch, int64_t seqlen, const Context& context) {
  const int64_t tokens = is_gpu(context) ? kGpuChunkTokens : kChunkTokens;
  return std::clamp<int64_t>(tokens / batch, 1, seqlen);
}

// (batch, seqlen, n) as few (rows, n) views as its strides allow.
std::vector<TensorView> row_views(const TensorView& tensor) {
  if (tensor.shape[1] == 1) return {tensor.select(1, 0)};
  if (tensor.shape[0] == 1) return {tensor.select(0, 0)};
  if (tensor.strides[0] == tensor.shape[1] * tensor.strides[1]) {
    TensorView rows = tensor.select(0, 0);
    rows.shape[0] = tensor.shape[0] * tensor.shape[1];
    return {rows};
  }
  std::vector<TensorView> views;
  for (int64_t b = 0; b < tensor.shape[0]; ++b) views.push_back(tensor.select(0, b));
  return views;
}

// Contiguous (batch, seqlen, n) as (batch · seqlen, n).
TensorView flat(const TensorView& tensor) {
  return row_views(tensor).front();
}

int32_t entry(const TensorView& list, int64_t i) {
  return list.as<const int32_t>()[i * list.strides[0]];
}

// A copy of (rows, n) of the host, whatever its strides, in contiguous memory of the device.
void upload(const TensorView& host, const TensorView& device, const Exec& exec) {
  const size_t size = dtype_size(host.dtype), row_bytes = size * static_cast<size_t>(host.shape[1]);
  std::vector<char> values(row_bytes * static_cast<size_t>(host.shape[0]));
  const bool is_whole = host.strides[1] == 1;  // a row: else ids are copied one by one
  const int64_t pieces = is_whole ? 1 : host.shape[1];
  const size_t piece_bytes = is_whole ? row_bytes : size;
  char* to = values.data();
  for (int64_t b = 0; b < host.shape[0]; ++b)
    for (int64_t i = 0; i < pieces; ++i, to += piece_bytes)
      std::memcpy(to, host.as<const char>() + (b * host.strides[0] + i * host.strides[1]) * size,
                  piece_bytes);
  copy_bytes(exec.context, device.data, values.data(), values.size(), exec.stream);
}

// The packed sequences of one chunk, none of them empty: at most one for each token.
struct PackedChunk {
  TensorView cu_seqlens, state_indices;  // as in MixerFwdArgs
  TensorView last_positions;             // of those that end in the chunk

  PackedChunk(int64_t length, Device device, Scratch& scratch)
      : cu_seqlens(scratch.tensor(DType::int32, {length + 1}, device)),
        state_indices(scratch.tensor(DType::int32, {length}, device)),
        last_positions(scratch.tensor(DType::int32, {length}, device)) {}

  // Cuts tokens [begin, begin + length) out of `all`, of which `row` is the first sequence that has
  // not ended before. Returns the first that does not end within.
  int64_t fill(const LanguageModelFwdArgs& all, int64_t row, int64_t begin, int64_t length,
               const Exec& exec) {
    if (!is_gpu(exec.context)) return fill_lists(all, row, begin, length);
    Scratch nowhere = Scratch::nowhere();
    PackedChunk(length, {}, nowhere);
    std::vector<char> memory(nowhere.used());
    Scratch scratch(memory.data());
    PackedChunk host(length, {}, scratch);
    row = host.fill_lists(all, row, begin, length);
    for (const auto& [from, to] : {std::pair{&host.cu_seqlens, &cu_seqlens},
                                   {&host.state_indices, &state_indices},
                                   {&host.last_positions, &last_positions}}) {
      to->shape[0] = from->shape[0];
      copy_bytes(exec.context, to->data, from->data,
                 sizeof(int32_t) * static_cast<size_t>(from->shape[0]), exec.stream);
    }
    return row;
  }

 private:
  // In memory of the host.
  int64_t fill_lists(const LanguageModelFwdArgs& all, int64_t row, int64_t begin, int64_t length) {
    const auto append = [](TensorView& list, int64_t value) {
      list.as<int32_t>()[list.shape[0]++] = static_cast<int32_t>(value);
    };
    for (TensorView* list : {&cu_seqlens, &state_indices, &last_positions}) list->shape[0] = 0;
    append(cu_seqlens, 0);
    for (; row < all.cu_seqlens.shape[0] - 1; ++row) {
      const int64_t from = std::max<int64_t>(entry(all.cu_seqlens, row) - begin, 0);
      const int64_t to = entry(all.cu_seqlens, row + 1) - begin;
      if (from >= length) break;
      if (from == to) continue;
      append(cu_seqlens, std::min(to, length));
      append(state_indices, all.state_indices ? entry(all.state_indices, row) : row);
      if (to > length) break;
      append(last_positions, to - 1);
    }
    return row;
  }
};

// Of each model in the process: an address would come again.
uint64_t next_serial() {
  static std::atomic<uint64_t> serial{0};
  return ++serial;
}

}  // namespace

// The activations of one chunk.
struct LanguageModel::Activations {
  TensorView residual, normed, hidden;  // (batch, length, d_model)
  TensorView token_ids, state_indices;  // room for those of the host, on a GPU

  Activations(int64_t batch, int64_t length, int64_t d_model, DType dtype, Device device,
              Scratch& scratch)
      : residual(scratch.tensor(DType::float32, {batch, length, d_model}, device)),
        normed(scratch.tensor(dtype, {batch, length, d_model}, device)),
        hidden(scratch.tensor(dtype, {batch, length, d_model}, device)) {
    if (device.type == DeviceType::cpu) return;
    token_ids = scratch.tensor(DType::int64, {batch, length}, device);
    state_indices = scratch.tensor(DType::int32, {batch}, device);
  }
};

LanguageModel::LanguageModel(const Checkpoint& checkpoint, const Context& context,
                             const LoadOptions& options)
    : checkpoint_(options.trainable ? float32_copy(checkpoint, context) : checkpoint),
      trainable_(options.trainable),
      serial_(next_serial()),
      context_(&context) {
  dtype_ = options.dtype     ? *options.dtype
           : is_gpu(context) ? stored_dtype(checkpoint)
                             : DType::float32;
  Checks("language_model", context.device())
      .require(std::find(kActivationTypes.begin(), kActivationTypes.end(), dtype_) !=
                   kActivationTypes.end(),
               [&] {
                 return std::string("dtype is ") + dtype_name(dtype_) +
                        ", expected float32, bfloat16 or float16";
               });
  try {
    load(options.progress);
  } catch (...) {
    context.allocator().release_unused();
    throw;
  }
}

LanguageModel::LanguageModel(LanguageModel&&) noexcept = default;

LanguageModel::~LanguageModel() {
  if (buffers_.empty()) return;
  Allocator& allocator = context_->allocator();
  allocator.release_unused();  // which waits: calls may be using the weights
  buffers_.clear();
  allocator.release_unused();
}

void LanguageModel::refresh(void* stream) {
  Checks("language_model", context_->device()).require(trainable_, [] {
    return std::string("refresh() of a model that is not trainable");
  });
  const Exec exec{*context_, stream, nullptr, 0};
  for (const ParameterCopyParams& copy : copies_)
    launch("refresh", kernel_table(*context_).parameter_copy, copy, exec);
}

void LanguageModel::load(const LoadProgress& progress) {
  WeightLoader loader(checkpoint_.tensors, *context_, dtype_, buffers_,
                      trainable_ ? &copies_ : nullptr, progress);
  constexpr int64_t kNoLayer = WeightLoader::kNoLayer;
  const int64_t d_model = config().d_model;
  embedding_ = loader.matrix("embedding", kNoLayer, config().padded_vocab_size, d_model);
  norm_f_ = loader.parameter("norm_f", kNoLayer, {d_model});
  TensorView head = embedding_;
  if (config().tie_embeddings)
    loader.ignore("lm_head");
  else
    head = loader.matrix("lm_head", kNoLayer, config().padded_vocab_size, d_model);
  head_ = head.slice(0, 0, config().vocab_size);
  for (int64_t i = 0; i < static_cast<int64_t>(config().layers.size()); ++i) {
    Layer layer;
    layer.norm = loader.parameter("norm", i, {d_model});
    layer.mixer = make_mixer(config(), i, dtype_, loader);
    layers_.push_back(std::move(layer));
  }
  parameters_ = loader.taken();
  if (trainable_) refresh();
  loader.finish();
}

void LanguageModel::save(const std::string& folder) const {
  const bool is_on_device = trainable_ && is_gpu(*context_);
  save_checkpoint(is_on_device ? host_copy(checkpoint_, *context_) : checkpoint_, folder);
}

int64_t LanguageModel::num_parameters() const {
  int64_t sum = 0;
  for (const auto& [name, tensor] : parameters_) sum += tensor.numel();
  return sum;
}

ModelState LanguageModel::new_state(int64_t num_slots, void* stream) const {
  std::vector<std::vector<StateSpec>> states;
  for (const Layer& layer : layers_) states.push_back(layer.mixer->state_specs());
  return ModelState(states, num_slots, *context_, serial_, stream);
}

size_t LanguageModel::workspace_size(int64_t batch, int64_t seqlen, const Context& context) const {
  // A shorter last chunk may need more than a whole one: other algorithms serve few rows.
  const int64_t chunk = chunk_length(batch, seqlen, context), last = seqlen % chunk;
  return std::max(chunk_workspace_size(batch, chunk, context),
                  last > 0 ? chunk_workspace_size(batch, last, context) : 0);
}

size_t LanguageModel::chunk_workspace_size(int64_t batch, int64_t length,
                                           const Context& context) const {
  const Device device = context.device();
  Scratch scratch = Scratch::nowhere();
  PackedChunk(length, device, scratch);
  const Activations at(batch, length, config().d_model, dtype_, device, scratch);
  size_t largest = rms_norm_fwd_workspace_size(
      add_and_norm(flat(at.hidden), flat(at.residual), flat(at.residual), norm_f_,
                   config().norm_eps, flat(at.normed)),
      context);

  const auto add_mixers = [&](const TensorView& cu_seqlens, int64_t slots) {
    for (size_t i = 0; i < layers_.size(); ++i) {
      // Layers of a kind are alike.
      if (i > 0 && config().layers[i] == config().layers[i - 1]) continue;
      const Layer& layer = layers_[i];
      Scratch nowhere = Scratch::nowhere();  // of states only the shapes matter
      std::vector<TensorView> states;
      for (const StateSpec& spec : layer.mixer->state_specs())
        states.push_back(nowhere.tensor(spec.dtype, {slots, spec.shape[0], spec.shape[1]}, device));
      const MixerFwdArgs args{at.normed, at.hidden, states.data(), {}, cu_seqlens};
      largest = std::max(largest, layer.mixer->workspace_size(args, context));
      if (length > 1) continue;
      const LayerStepArgs step{flat(at.residual), layer.norm, {}, true, 0, states.data(), {}};
      largest = std::max(largest, layer.mixer->step_workspace_size(step, context).value_or(0));
    }
  };
  const auto add_head = [&](int64_t rows) {
    const TensorView x(at.normed.data, dtype_, {rows, config().d_model}, device);
    const TensorView logits(at.normed.data, DType::float32, {rows, config().vocab_size}, device);
    largest = std::max(largest, linear_workspace_size({x, head_, {}, logits}, context));
  };
  add_mixers({}, batch);
  for (const int64_t rows : {batch, length, batch * length}) add_head(rows);
  if (batch == 1 && length > 1) {  // which may be packed, up to one sequence for each token
    std::vector<int32_t> ends(static_cast<size_t>(length) + 1);
    std::iota(ends.begin(), ends.end(), 0);  // looked at on the CPU alone
    add_mixers(TensorView(ends.data(), DType::int32, {length + 1}, device), length);
    for (int64_t rows = 1; rows < std::min(length, kLastPositions); ++rows) add_head(rows);
    add_head(std::min(length, kLastPositions));
  }
  return scratch.used() + largest;
}

void LanguageModel::forward(const LanguageModelFwdArgs& args, const Exec& exec) const {
  const Context& context = exec.context;
  const Checks check("language_model", context.device()), check_host("language_model", {});
  check.require(context.device() == context_->device(), [&] {
    return "the model is on " + to_string(context_->device()) + ", the context is of " +
           to_string(context.device());
  });
  const auto check_of = [&](const TensorView& tensor) -> const Checks& {
    return tensor.device == Device{} ? check_host : check;
  };
  check.rank(args.token_ids, "token_ids", 2, "(batch, seqlen)");
  const Dim batch{"batch", args.token_ids.shape[0]}, seqlen{"seqlen", args.token_ids.shape[1]};
  const Checks& check_ids = check_of(args.token_ids);
  check_ids.input(args.token_ids, "token_ids", {batch, seqlen}, {DType::int32, DType::int64});
  check_ids.token_ids(args.token_ids, config().vocab_size);
  const Dim rows{"rows", args.cu_seqlens
                             ? check_host.cu_seqlens(args.cu_seqlens, batch.size, seqlen.size)
                             : batch.size};
  const Dim vocab_size{"vocab_size", config().vocab_size};
  if (args.logits.rank == 3)
    check.output(args.logits, "logits", {batch, seqlen, vocab_size}, {DType::float32});
  else if (args.logits)
    check.output(args.logits, "logits", {rows, vocab_size}, {DType::float32});
  if (args.cu_seqlens && args.logits.rank == 2)
    for (int64_t row = 0; row < rows.size; ++row)
      check.require(entry(args.cu_seqlens, row) < entry(args.cu_seqlens, row + 1), [&] {
        return "cu_seqlens makes sequence " + std::to_string(row) +
               " empty, which has no last position for logits";
      });
  check.require(args.state != nullptr, [] { return std::string("state is missing"); });
  check.require(args.state->model_ == serial_,
                [] { return std::string("state was made by another model"); });
  const int64_t slots = args.state->num_slots();
  check.require(args.state_indices || slots == rows.size, [&] {
    return "state has " + std::to_string(slots) + " slots, expected one for each of " +
           std::to_string(rows.size) + " rows, or state_indices";
  });
  (args.cu_seqlens ? check_host : check_of(args.state_indices))
      .state_indices(args.state_indices, rows.size, slots);
  check.workspace(exec, workspace_size(batch.size, seqlen.size, context));

  const int64_t chunk = chunk_length(batch.size, seqlen.size, context);
  int64_t row = 0;  // packed: the first that has not ended
  for (int64_t begin = 0; begin < seqlen.size; begin += chunk) {
    const int64_t length = std::min(chunk, seqlen.size - begin);
    if (args.cu_seqlens)
      row = forward_packed_chunk(args, row, begin, length, exec);
    else
      forward_chunk(args, begin, length, exec);
  }
}

void LanguageModel::forward_chunk(const LanguageModelFwdArgs& args, int64_t begin, int64_t length,
                                  const Exec& exec) const {
  Scratch scratch(exec.workspace);
  const Activations at(args.token_ids.shape[0], length, config().d_model, dtype_,
                       exec.context.device(), scratch);
  const Exec rest = scratch.rest(exec);
  TensorView slots = args.state_indices;
  if (slots && slots.device != exec.context.device()) {
    upload(slots.unsqueeze(0), at.state_indices, rest);
    slots = at.state_indices;
  }
  const TensorView hidden =
      forward_layers(args.token_ids.slice(1, begin, length), *args.state, slots, {}, at, rest);
  if (args.logits.rank == 3) {
    all_logits(args.logits.slice(1, begin, length), hidden, at, rest);
  } else if (args.logits && begin + length == args.token_ids.shape[1]) {
    const auto last = [&](const TensorView& tensor) {
      return tensor ? tensor.select(1, length - 1) : tensor;
    };
    final_norm(last(hidden), last(at.residual), last(at.normed), rest);
    linear({last(at.normed), head_, {}, args.logits}, rest);
  }
}

int64_t LanguageModel::forward_packed_chunk(const LanguageModelFwdArgs& args, int64_t row,
                                            int64_t begin, int64_t length, const Exec& exec) const {
  const Device device = exec.context.device();
  Scratch scratch(exec.workspace);
  PackedChunk packed(length, device, scratch);
  const int64_t next_row = packed.fill(args, row, begin, length, exec);
  const Activations at(1, length, config().d_model, dtype_, device, scratch);
  const Exec rest = scratch.rest(exec);
  const bool is_one = packed.state_indices.shape[0] == 1;  // and so a row like any other
  const TensorView hidden =
      forward_layers(args.token_ids.slice(1, begin, length), *args.state, packed.state_indices,
                     is_one ? TensorView() : packed.cu_seqlens, at, rest);
  if (args.logits.rank == 3) {
    all_logits(args.logits.slice(1, begin, length), hidden, at, rest);
  } else if (const int64_t num_ended = packed.last_positions.shape[0]; args.logits && num_ended) {
    final_norm(hidden ? flat(hidden) : hidden, flat(at.residual), flat(at.normed), rest);
    const TensorView last = at.hidden.select(0, 0).slice(0, 0, num_ended);  // no longer needed
    embedding({packed.last_positions, at.normed.select(0, 0), last}, rest);
    for (int64_t i = 0; i < num_ended; i += kLastPositions) {
      const int64_t count = std::min(kLastPositions, num_ended - i);
      linear({last.slice(0, i, count), head_, {}, args.logits.slice(0, row + i, count)}, rest);
    }
  }
  return next_row;
}

TensorView LanguageModel::forward_layers(const TensorView& given_ids, const ModelState& state,
                                         const TensorView& state_indices,
                                         const TensorView& cu_seqlens, const Activations& at,
                                         const Exec& exec) const {
  TensorView token_ids = given_ids;
  if (token_ids.device != exec.context.device()) {
    token_ids = TensorView(at.token_ids.data, given_ids.dtype,
                           {given_ids.shape[0], given_ids.shape[1]}, exec.context.device());
    upload(given_ids, token_ids, exec);
  }
  if (token_ids.shape[1] == 1)
    embedding({token_ids.select(1, 0), embedding_, flat(at.residual)}, exec);
  else if (token_ids.is_contiguous())
    embedding({flat(token_ids.unsqueeze(2)).select(1, 0), embedding_, flat(at.residual)}, exec);
  else
    for (int64_t b = 0; b < token_ids.shape[0]; ++b)
      embedding({token_ids.select(0, b), embedding_, at.residual.select(0, b)}, exec);

  const bool is_step =
      token_ids.shape[1] == 1 && !cu_seqlens && state_indices && state_indices.is_contiguous();
  if (is_step && step_layers(state, state_indices, at, exec)) return {};

  TensorView hidden;  // of the layer before
  for (size_t i = 0; i < layers_.size(); ++i) {
    rms_norm_fwd(add_and_norm(hidden, flat(at.residual), flat(at.residual), layers_[i].norm,
                              config().norm_eps, flat(at.normed)),
                 exec);
    layers_[i].mixer->forward(
        {at.normed, at.hidden, state.tensors_[i].data(), state_indices, cu_seqlens}, exec);
    hidden = flat(at.hidden);
  }
  return at.hidden;
}

bool LanguageModel::step_layers(const ModelState& state, const TensorView& state_indices,
                                const Activations& at, const Exec& exec) const {
  const auto args = [&](size_t i) {
    const TensorView next_norm = i + 1 < layers_.size() ? layers_[i + 1].norm : TensorView();
    return LayerStepArgs{flat(at.residual), layers_[i].norm,          next_norm,    i == 0,
                         config().norm_eps, state.tensors_[i].data(), state_indices};
  };
  for (size_t i = 0; i < layers_.size(); ++i)
    if (!layers_[i].mixer->step_workspace_size(args(i), exec.context)) return false;
  for (size_t i = 0; i < layers_.size(); ++i) layers_[i].mixer->step(args(i), exec);
  return true;
}

void LanguageModel::final_norm(const TensorView& hidden, const TensorView& residual,
                               const TensorView& normed, const Exec& exec) const {
  rms_norm_fwd(add_and_norm(hidden, residual, residual, norm_f_, config().norm_eps, normed), exec);
}

void LanguageModel::all_logits(const TensorView& logits, const TensorView& hidden,
                               const Activations& at, const Exec& exec) const {
  final_norm(hidden ? flat(hidden) : hidden, flat(at.residual), flat(at.normed), exec);
  // The activations are contiguous; a chunk of the logits may not be.
  const std::vector<TensorView> out = row_views(logits);
  if (out.size() == 1) return linear({flat(at.normed), head_, {}, out.front()}, exec);
  for (int64_t b = 0; b < logits.shape[0]; ++b)
    linear({at.normed.select(0, b), head_, {}, out[b]}, exec);
}

}  // namespace ssmcore
