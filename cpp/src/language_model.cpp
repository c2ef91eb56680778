#include "ssmcore/language_model.h"

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "mixer.h"
#include "scratch.h"
#include "ssmcore/embedding.h"
#include "ssmcore/error.h"
#include "ssmcore/linear.h"
#include "ssmcore/rms_norm.h"
#include "weight_loader.h"

namespace ssmcore {
namespace {

// Tokens, over all rows, that one pass through the layers takes: enough for matrix products to be
// efficient, few enough for memory to stay small.
constexpr int64_t kChunkTokens = 512;

int64_t chunk_length(int64_t batch, int64_t seqlen) {
  return std::clamp<int64_t>(kChunkTokens / batch, 1, seqlen);
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

// The activations of one chunk.
struct Activations {
  TensorView residual, normed, hidden;  // (batch, length, d_model)

  Activations(int64_t batch, int64_t length, int64_t d_model, DType dtype, Device device,
              Scratch& scratch)
      : residual(scratch.tensor(DType::float32, {batch, length, d_model}, device)),
        normed(scratch.tensor(dtype, {batch, length, d_model}, device)),
        hidden(scratch.tensor(dtype, {batch, length, d_model}, device)) {}
};

// residual += hidden; normed = norm(residual). Without hidden there is nothing to add.
RmsNormFwdArgs add_and_norm(const TensorView& hidden, const TensorView& residual,
                            const TensorView& weight, float eps, const TensorView& normed) {
  RmsNormFwdArgs args;
  args.weight = weight;
  args.eps = eps;
  args.out = normed;
  args.x = hidden ? hidden : residual;
  if (hidden) args.residual = args.residual_out = residual;
  return args;
}

}  // namespace

struct LanguageModel::Layer {
  TensorView norm;
  std::unique_ptr<Mixer> mixer;
};

size_t ModelState::nbytes() const {
  return buffer_.bytes();
}

void ModelState::check_slot(const char* name, int64_t slot) const {
  Checks("model_state", {}).require(slot >= 0 && slot < num_slots_, [&] {
    return std::string(name) + " is " + std::to_string(slot) + ", the state has " +
           std::to_string(num_slots_) + " slots";
  });
}

void ModelState::reset_slot(int64_t slot) {
  check_slot("slot", slot);
  for (const auto& layer : tensors_)
    for (const TensorView& tensor : layer) {
      const TensorView row = tensor.select(0, slot);
      std::memset(row.data, 0, static_cast<size_t>(row.numel()) * dtype_size(row.dtype));
    }
}

void ModelState::copy_slot(int64_t from, int64_t to) {
  check_slot("from", from);
  check_slot("to", to);
  if (from == to) return;
  for (const auto& layer : tensors_)
    for (const TensorView& tensor : layer) {
      const TensorView source = tensor.select(0, from);
      std::memcpy(tensor.select(0, to).data, source.data,
                  static_cast<size_t>(source.numel()) * dtype_size(source.dtype));
    }
}

LanguageModel::LanguageModel(const Checkpoint& checkpoint, const Context& context,
                             const LoadOptions& options)
    : checkpoint_(checkpoint), dtype_(options.dtype) {
  Checks("language_model", context.device())
      .require(std::find(kActivationTypes.begin(), kActivationTypes.end(), dtype_) !=
                   kActivationTypes.end(),
               [&] {
                 return std::string("dtype is ") + dtype_name(dtype_) +
                        ", expected float32, bfloat16 or float16";
               });
  allocator_ = &context.allocator();
  WeightLoader loader(checkpoint_.tensors, *allocator_, buffers_);
  constexpr int64_t kNoLayer = WeightLoader::kNoLayer;
  const int64_t d_model = config().d_model;
  embedding_ = loader.matrix("embedding", kNoLayer, config().padded_vocab_size, d_model);
  norm_f_ = loader.parameter("norm_f", kNoLayer, {d_model});
  if (config().tie_embeddings) {
    head_ = embedding_;
    loader.ignore("lm_head");
  } else {
    head_ = loader.matrix("lm_head", kNoLayer, config().padded_vocab_size, d_model);
  }
  head_ = head_.slice(0, 0, config().vocab_size);
  for (int64_t i = 0; i < static_cast<int64_t>(config().layers.size()); ++i) {
    Layer layer;
    layer.norm = loader.parameter("norm", i, {d_model});
    layer.mixer = make_mixer(config(), i, dtype_, loader);
    layers_.push_back(std::move(layer));
  }
  loader.finish();
  num_parameters_ = loader.num_parameters();
}

LanguageModel::~LanguageModel() = default;
LanguageModel::LanguageModel(LanguageModel&&) noexcept = default;

ModelState LanguageModel::new_state(int64_t num_slots) const {
  Checks("language_model", {}).require(num_slots > 0, [&] {
    return "num_slots is " + std::to_string(num_slots) + ", expected at least 1";
  });
  ModelState state;
  state.num_slots_ = num_slots;
  state.model_ = layers_.data();
  // Placed nowhere first, for the size, then in the memory.
  const auto place = [&](Scratch scratch) {
    state.tensors_.clear();
    for (const Layer& layer : layers_) {
      state.tensors_.emplace_back();
      for (const StateSpec& spec : layer.mixer->state_specs())
        state.tensors_.back().push_back(scratch.tensor(
            spec.dtype, {num_slots, spec.shape[0], spec.shape[1]}, allocator_->device()));
    }
    return scratch.used();
  };
  state.buffer_ = Buffer(*allocator_, place(Scratch::nowhere()), "the states of a model");
  place(Scratch(state.buffer_.data()));
  std::memset(state.buffer_.data(), 0, state.buffer_.bytes());
  return state;
}

size_t LanguageModel::workspace_size(int64_t batch, int64_t seqlen, const Context& context) const {
  const Device device = context.device();
  const int64_t d_model = config().d_model;
  const auto for_length = [&](int64_t length) {
    Scratch scratch = Scratch::nowhere();
    const Activations at(batch, length, d_model, dtype_, device, scratch);
    const TensorView hidden = at.hidden.select(0, 0), residual = at.residual.select(0, 0);
    size_t largest = rms_norm_fwd_workspace_size(
        add_and_norm(hidden, residual, norm_f_, config().norm_eps, at.normed.select(0, 0)),
        context);
    for (const Layer& layer : layers_) {
      // A state of the right shape, of which only the shape matters.
      Scratch nowhere = Scratch::nowhere();
      std::vector<TensorView> states;
      for (const StateSpec& spec : layer.mixer->state_specs())
        states.push_back(nowhere.tensor(spec.dtype, {batch, spec.shape[0], spec.shape[1]}, device));
      const MixerFwdArgs args{at.normed, at.hidden, states.data(), {}};
      largest = std::max(largest, layer.mixer->workspace_size(args, context));
    }
    for (const int64_t rows : {batch, length, batch * length}) {
      TensorView x = at.normed.select(0, 0),
                 logits(hidden.data, DType::float32, {rows, config().vocab_size}, device);
      x.shape[0] = rows;
      largest = std::max(largest, linear_workspace_size({x, head_, {}, logits}, context));
    }
    return scratch.used() + largest;
  };
  // A shorter last chunk may need more than a whole one: other algorithms serve few rows.
  const int64_t chunk = chunk_length(batch, seqlen), last = seqlen % chunk;
  return std::max(for_length(chunk), last > 0 ? for_length(last) : 0);
}

void LanguageModel::forward(const LanguageModelFwdArgs& args, const Exec& exec) const {
  const Context& context = exec.context;
  const Checks check("language_model", context.device());
  check.rank(args.token_ids, "token_ids", 2, "(batch, seqlen)");
  const int64_t batch = args.token_ids.shape[0], seqlen = args.token_ids.shape[1];
  check.input(args.token_ids, "token_ids", {{"batch", batch}, {"seqlen", seqlen}},
              {DType::int32, DType::int64});
  check.token_ids(args.token_ids, config().vocab_size);
  const bool all_logits = args.logits.rank == 3;
  const Dim vocab_size{"vocab_size", config().vocab_size};
  if (all_logits)
    check.output(args.logits, "logits", {{"batch", batch}, {"seqlen", seqlen}, vocab_size},
                 {DType::float32});
  else if (args.logits)
    check.output(args.logits, "logits", {{"batch", batch}, vocab_size}, {DType::float32});
  check.require(args.state != nullptr, [] { return std::string("state is missing"); });
  check.require(args.state->model_ == layers_.data(),
                [] { return std::string("state was made by another model"); });
  const int64_t slots = args.state->num_slots();
  check.require(args.state_indices || slots == batch, [&] {
    return "state has " + std::to_string(slots) + " slots, expected one for each of " +
           std::to_string(batch) + " rows, or state_indices";
  });
  check.state_indices(args.state_indices, batch, slots);
  check.workspace(exec, workspace_size(batch, seqlen, context));

  const int64_t chunk = chunk_length(batch, seqlen);
  for (int64_t t = 0; t < seqlen; t += chunk) {
    const int64_t length = std::min(chunk, seqlen - t);
    const bool last = t + length == seqlen;
    TensorView logits;
    if (all_logits)
      logits = args.logits.slice(1, t, length);
    else if (last && args.logits)
      logits = args.logits.unsqueeze(1);
    forward_chunk(args, t, length, logits, exec);
  }
}

// Tokens [begin, begin + length) of every row. Logits, (batch, n, vocab_size), are those of the
// chunk's last n positions; absent, the head is left out.
void LanguageModel::forward_chunk(const LanguageModelFwdArgs& args, int64_t begin, int64_t length,
                                  const TensorView& logits, const Exec& exec) const {
  const int64_t batch = args.token_ids.shape[0];
  Scratch scratch(exec.workspace);
  const Activations at(batch, length, config().d_model, dtype_, exec.context.device(), scratch);
  const Exec rest = scratch.rest(exec);
  const auto flat = [](const TensorView& tensor) { return row_views(tensor).front(); };

  const TensorView ids = args.token_ids.slice(1, begin, length);
  if (length == 1)
    embedding({ids.select(1, 0), embedding_, flat(at.residual)}, rest);
  else
    for (int64_t b = 0; b < batch; ++b)
      embedding({ids.select(0, b), embedding_, at.residual.select(0, b)}, rest);

  TensorView hidden;  // of the layer before
  for (size_t i = 0; i < layers_.size(); ++i) {
    rms_norm_fwd(add_and_norm(hidden, flat(at.residual), layers_[i].norm, config().norm_eps,
                              flat(at.normed)),
                 rest);
    layers_[i].mixer->forward(
        {at.normed, at.hidden, args.state->tensors_[i].data(), args.state_indices}, rest);
    hidden = flat(at.hidden);
  }
  if (!logits) return;

  const int64_t positions = logits.shape[1];
  const auto tail = [&](const TensorView& tensor) {
    return tensor.slice(1, length - positions, positions);
  };
  const TensorView normed = tail(at.normed);
  rms_norm_fwd(add_and_norm(flat(tail(at.hidden)), flat(tail(at.residual)), norm_f_,
                            config().norm_eps, flat(normed)),
               rest);
  // The activations are contiguous; a chunk of the logits may not be.
  const std::vector<TensorView> out = row_views(logits);
  if (out.size() == 1) return linear({flat(normed), head_, {}, out.front()}, rest);
  for (int64_t b = 0; b < batch; ++b) linear({normed.select(0, b), head_, {}, out[b]}, rest);
}

}  // namespace ssmcore
