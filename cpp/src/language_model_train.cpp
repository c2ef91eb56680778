// Training a language model: the loss and its gradients.
#include <algorithm>
#include <cstring>
#include <string>

#include "checks.h"
#include "language_model_parts.h"
#include "scratch.h"
#include "ssmcore/cross_entropy.h"
#include "ssmcore/embedding.h"
#include "ssmcore/error.h"
#include "ssmcore/linear.h"
#include "ssmcore/rms_norm.h"
#include "strided.h"
#include "weight_loader.h"

namespace ssmcore {
namespace {

constexpr const char* kOp = "loss_and_gradients";
constexpr int64_t kNoLayer = WeightLoader::kNoLayer;

// Positions whose logits exist at a time: enough for matrix products to be efficient.
constexpr int64_t kHeadTokens = 512;

// Contiguous (batch, seqlen, n) as (batch · seqlen, n).
TensorView flat(const TensorView& tensor) {
  TensorView rows = tensor.select(0, 0);
  rows.shape[0] = tensor.shape[0] * tensor.shape[1];
  return rows;
}

// (batch, seqlen) integers of any strides, one after another.
void copy_integers(const TensorView& from, const TensorView& to) {
  int64_t* next = to.as<int64_t>();
  for (int64_t b = 0; b < from.shape[0]; ++b)
    for (int64_t t = 0; t < from.shape[1]; ++t)
      *next++ = integer_at(from.data, from.dtype, b * from.strides[0] + t * from.strides[1]);
}

}  // namespace

// One step: the operators' operands, placed in the caller's tensors and the scratch.
class LanguageModel::TrainingStep {
 public:
  TrainingStep(const LanguageModel& model, const LanguageModelTrainArgs& args,
               const Context& context, Scratch& scratch);

  size_t largest_workspace(const Context& context) const;
  void run(const Exec& exec);

 private:
  // Positions [begin, begin + length) of the head, in the order in which they run.
  struct Head {
    LinearArgs logits;
    CrossEntropyFwdArgs loss;
    CrossEntropyBwdArgs loss_bwd;
    LinearBwdArgs logits_bwd;
  };

  void check(const Checks& check) const;
  int64_t count_targets(const Checks& check) const;

  float eps() const { return model_.config().norm_eps; }
  size_t num_layers() const { return model_.layers_.size(); }
  const TensorView& norm_weight(size_t i) const {
    return i < num_layers() ? model_.layers_[i].norm : model_.norm_f_;
  }
  Gradient norm_gradient(size_t i) const {
    return i < num_layers() ? gradient_of(args_.gradients, "norm", static_cast<int64_t>(i))
                            : gradient_of(args_.gradients, "norm_f", kNoLayer);
  }
  // Norm i is that before layer i; the last is that before the head.
  RmsNormFwdArgs norm(size_t i) const;
  RmsNormFwdArgs norm_again(size_t i) const;
  RmsNormBwdArgs norm_bwd(size_t i) const;
  MixerTrainArgs mixer(size_t i) const { return {normed_, args_.cu_seqlens, saved_[i]}; }
  Gradient head_gradient() const;
  Head head(int64_t begin, int64_t length) const;
  EmbeddingBwdArgs embedding_bwd() const;

  void forward(const Exec& exec) const;
  void loss(const Exec& exec);
  void backward(const Exec& exec) const;

  const LanguageModel& model_;
  const LanguageModelTrainArgs& args_;
  int64_t tokens_, d_model_;
  TensorView token_ids_, targets_;     // (tokens), int64
  std::vector<TensorView> residuals_;  // what enters each norm: (tokens, d_model), float32
  std::vector<void*> saved_;     // of each layer's mixer; layers that are computed again share one
  TensorView normed_, dnormed_;  // (batch, seqlen, d_model)
  TensorView hidden_;            // (batch, seqlen, d_model): also its gradient
  TensorView dresidual_;         // (tokens, d_model), float32
  TensorView logits_, position_loss_, lse_;  // of kHeadTokens positions, float32
  float dloss_ = 0;                          // by each position's loss
};

LanguageModel::TrainingStep::TrainingStep(const LanguageModel& model,
                                          const LanguageModelTrainArgs& args,
                                          const Context& context, Scratch& scratch)
    : model_(model), args_(args), d_model_(model.config().d_model) {
  if (context.device().type != DeviceType::cpu)
    throw Error(ErrorCode::unsupported, std::string(kOp) + ": runs on the CPU only");
  check(Checks(kOp, context.device()));
  const Device device = context.device();
  const int64_t batch = args.token_ids.shape[0], seqlen = args.token_ids.shape[1];
  tokens_ = batch * seqlen;
  token_ids_ = scratch.tensor(DType::int64, {tokens_}, device);
  targets_ = scratch.tensor(DType::int64, {tokens_}, device);
  const auto stream = [&] { return scratch.tensor(DType::float32, {tokens_, d_model_}, device); };
  const auto activation = [&] {
    return scratch.tensor(model.dtype(), {batch, seqlen, d_model_}, device);
  };
  for (size_t i = 0; i <= num_layers(); ++i) residuals_.push_back(stream());
  dresidual_ = stream();
  normed_ = activation();
  dnormed_ = activation();
  hidden_ = activation();
  const int64_t positions = std::min(tokens_, kHeadTokens);
  logits_ = scratch.tensor(DType::float32, {positions, model.config().vocab_size}, device);
  position_loss_ = scratch.tensor(DType::float32, {positions}, device);
  lse_ = scratch.tensor(DType::float32, {positions}, device);

  std::vector<size_t> sizes;
  for (const Layer& layer : model.layers_)
    sizes.push_back(layer.mixer->saved_size({normed_, args.cu_seqlens}, context));
  void* shared = args.recompute_layers
                     ? scratch.bytes(*std::max_element(sizes.begin(), sizes.end()))
                     : nullptr;
  for (const size_t size : sizes) saved_.push_back(shared ? shared : scratch.bytes(size));
}

void LanguageModel::TrainingStep::check(const Checks& check) const {
  check.rank(args_.token_ids, "token_ids", 2, "(batch, seqlen)");
  const Dim batch{"batch", args_.token_ids.shape[0]}, seqlen{"seqlen", args_.token_ids.shape[1]};
  check.input(args_.token_ids, "token_ids", {batch, seqlen}, {DType::int32, DType::int64});
  check.input(args_.targets, "targets", {batch, seqlen}, {DType::int32, DType::int64});
  if (args_.cu_seqlens) check.cu_seqlens(args_.cu_seqlens, batch.size, seqlen.size);
  check.require(args_.num_targets >= 0, [&] {
    return "num_targets is " + std::to_string(args_.num_targets) + ", expected at least 0";
  });
  check.output(args_.loss, "loss", {{"losses", 1}}, {DType::float32});
  for (const auto& [name, gradient] : args_.gradients) {
    const auto what = [name = &name] { return "the gradient of " + *name; };
    const auto parameter = model_.parameters_.find(name);
    check.require(parameter != model_.parameters_.end(),
                  [&] { return what() + ": the model has no such parameter"; });
    const TensorView& tensor = gradient.tensor;
    check.require(static_cast<bool>(tensor), [&] { return what() + " is missing"; });
    check.require(tensor.dtype == DType::float32, [&] {
      return what() + " has dtype " + dtype_name(tensor.dtype) + ", expected float32";
    });
    check.require(tensor.shape_string() == parameter->second.shape_string(), [&] {
      return what() + " has shape " + tensor.shape_string() + ", expected " +
             parameter->second.shape_string();
    });
    check.require(tensor.is_contiguous(), [&] { return what() + " is not contiguous"; });
    check.require(tensor.device.type == DeviceType::cpu && tensor.data,
                  [&] { return what() + " has no memory on the CPU"; });
  }
}

int64_t LanguageModel::TrainingStep::count_targets(const Checks& check) const {
  const int64_t vocab_size = model_.config().vocab_size;
  int64_t count = 0;
  for (int64_t i = 0; i < tokens_; ++i) {
    const int64_t target = targets_.as<const int64_t>()[i];
    if (target == kIgnoredTarget) continue;
    check.require(target >= 0 && target < vocab_size, [&] {
      return "targets holds " + std::to_string(target) + " at position " + std::to_string(i) +
             ", expected 0 to " + std::to_string(vocab_size - 1) + ", or " +
             std::to_string(kIgnoredTarget) + " to ignore it";
    });
    ++count;
  }
  return count;
}

RmsNormFwdArgs LanguageModel::TrainingStep::norm(size_t i) const {
  return i == 0 ? norm_again(0)
                : add_and_norm(flat(hidden_), residuals_[i - 1], residuals_[i], norm_weight(i),
                               eps(), flat(normed_));
}

RmsNormFwdArgs LanguageModel::TrainingStep::norm_again(size_t i) const {
  return add_and_norm({}, residuals_[i], {}, norm_weight(i), eps(), flat(normed_));
}

// Adds to the residual's gradient, which then is also that of what the layer before has added.
RmsNormBwdArgs LanguageModel::TrainingStep::norm_bwd(size_t i) const {
  RmsNormBwdArgs args;
  args.x = residuals_[i];
  args.weight = norm_weight(i);
  args.eps = eps();
  args.dout = flat(dnormed_);
  if (i < num_layers()) args.dresidual_out = dresidual_;
  args.dresidual = {dresidual_};
  if (i > 0) args.dx = {flat(hidden_)};
  args.dweight = norm_gradient(i);
  return args;
}

// Tied to the embedding, or of its own.
Gradient LanguageModel::TrainingStep::head_gradient() const {
  return gradient_of(args_.gradients, model_.config().tie_embeddings ? "embedding" : "lm_head",
                     kNoLayer);
}

LanguageModel::TrainingStep::Head LanguageModel::TrainingStep::head(int64_t begin,
                                                                    int64_t length) const {
  const auto part = [&](const TensorView& all) { return all.slice(0, begin, length); };
  const TensorView logits = logits_.slice(0, 0, length), lse = lse_.slice(0, 0, length);
  Head head;
  head.logits = {part(flat(normed_)), model_.head_, {}, logits};
  head.loss.logits = logits;
  head.loss.targets = part(targets_);
  head.loss.ignore_index = kIgnoredTarget;
  head.loss.loss = position_loss_.slice(0, 0, length);
  head.loss.lse = lse;
  head.loss_bwd.logits = logits;
  head.loss_bwd.targets = part(targets_);
  head.loss_bwd.ignore_index = kIgnoredTarget;
  head.loss_bwd.lse = lse;
  head.loss_bwd.dloss = TensorView(const_cast<float*>(&dloss_), DType::float32, {length}, {0});
  head.loss_bwd.dlogits = {logits};
  head.logits_bwd.x = part(flat(normed_));
  head.logits_bwd.weight = model_.head_;
  head.logits_bwd.dout = logits;
  head.logits_bwd.dx = {part(flat(dnormed_))};
  if (Gradient dweight = head_gradient(); dweight.tensor) {
    dweight.tensor = dweight.tensor.slice(0, 0, model_.config().vocab_size);
    if (begin > 0) dweight.accumulate = true;
    head.logits_bwd.dweight = dweight;
  }
  return head;
}

// A gradient that is shared with the head has that part already.
EmbeddingBwdArgs LanguageModel::TrainingStep::embedding_bwd() const {
  EmbeddingBwdArgs args;
  args.token_ids = token_ids_;
  args.dout = dresidual_;
  args.dweight = gradient_of(args_.gradients, "embedding", kNoLayer);
  if (model_.config().tie_embeddings) args.dweight.accumulate = true;
  return args;
}

size_t LanguageModel::TrainingStep::largest_workspace(const Context& context) const {
  size_t largest = 0;
  const auto add = [&](size_t size) { largest = std::max(largest, size); };
  for (size_t i = 0; i <= num_layers(); ++i) {
    add(rms_norm_fwd_workspace_size(norm(i), context));
    add(rms_norm_bwd_workspace_size(norm_bwd(i), context));
  }
  for (size_t i = 0; i < num_layers(); ++i)
    add(model_.layers_[i].mixer->train_workspace_size(mixer(i), args_.gradients, context));
  const int64_t whole = logits_.shape[0], last = tokens_ % whole;
  for (const int64_t length : {whole, last > 0 ? last : whole}) {
    const Head part = head(0, length);
    add(linear_workspace_size(part.logits, context));
    add(cross_entropy_fwd_workspace_size(part.loss, context));
    add(cross_entropy_bwd_workspace_size(part.loss_bwd, context));
    add(linear_bwd_workspace_size(part.logits_bwd, context));
  }
  if (const EmbeddingBwdArgs args = embedding_bwd(); args.dweight.tensor)
    add(embedding_bwd_workspace_size(args, context));
  return largest;
}

void LanguageModel::TrainingStep::run(const Exec& exec) {
  const Checks check(kOp, exec.context.device());
  check.token_ids(args_.token_ids, model_.config().vocab_size);
  copy_integers(args_.token_ids, token_ids_);
  copy_integers(args_.targets, targets_);
  const int64_t count = count_targets(check);
  check.require(count > 0 || args_.num_targets > 0,
                [] { return std::string("targets holds nothing that is not ignored"); });
  dloss_ = 1 / static_cast<float>(args_.num_targets > 0 ? args_.num_targets : count);
  forward(exec);
  loss(exec);
  backward(exec);
}

void LanguageModel::TrainingStep::forward(const Exec& exec) const {
  embedding({token_ids_, model_.embedding_, residuals_[0]}, exec);
  for (size_t i = 0; i < num_layers(); ++i) {
    rms_norm_fwd(norm(i), exec);
    model_.layers_[i].mixer->train_forward(mixer(i), hidden_, exec);
  }
  rms_norm_fwd(norm(num_layers()), exec);
}

void LanguageModel::TrainingStep::loss(const Exec& exec) {
  if (const Gradient dweight = head_gradient(); dweight.tensor && !dweight.accumulate) {
    // Rows that only pad the vocabulary.
    const int64_t used = model_.config().vocab_size * d_model_;
    std::fill(dweight.tensor.as<float>() + used,
              dweight.tensor.as<float>() + dweight.tensor.numel(), 0.0f);
  }
  double sum = 0;
  for (int64_t begin = 0; begin < tokens_; begin += kHeadTokens) {
    const Head part = head(begin, std::min(kHeadTokens, tokens_ - begin));
    linear(part.logits, exec);
    cross_entropy_fwd(part.loss, exec);
    for (int64_t i = 0; i < part.loss.loss.shape[0]; ++i) sum += part.loss.loss.as<float>()[i];
    cross_entropy_bwd(part.loss_bwd, exec);
    linear_bwd(part.logits_bwd, exec);
  }
  *args_.loss.as<float>() = static_cast<float>(sum * static_cast<double>(dloss_));
}

void LanguageModel::TrainingStep::backward(const Exec& exec) const {
  rms_norm_bwd(norm_bwd(num_layers()), exec);
  for (size_t i = num_layers(); i-- > 0;) {
    rms_norm_fwd(norm_again(i), exec);
    const Mixer& layer = *model_.layers_[i].mixer;
    if (args_.recompute_layers) layer.train_forward(mixer(i), dnormed_, exec);
    layer.backward(mixer(i), hidden_, dnormed_, args_.gradients, exec);
    rms_norm_bwd(norm_bwd(i), exec);
  }
  if (const EmbeddingBwdArgs args = embedding_bwd(); args.dweight.tensor)
    ssmcore::embedding_bwd(args, exec);
}

size_t LanguageModel::loss_and_gradients_workspace_size(const LanguageModelTrainArgs& args,
                                                        const Context& context) const {
  Scratch scratch = Scratch::nowhere();
  const TrainingStep step(*this, args, context, scratch);
  return scratch.used() + step.largest_workspace(context);
}

void LanguageModel::loss_and_gradients(const LanguageModelTrainArgs& args, const Exec& exec) const {
  // Placing operands touches no memory, so the step that runs can also tell whether there is room.
  Scratch scratch = exec.workspace ? Scratch(exec.workspace) : Scratch::nowhere();
  TrainingStep step(*this, args, exec.context, scratch);
  Checks(kOp, exec.context.device())
      .workspace(exec, scratch.used() + step.largest_workspace(exec.context));
  step.run(scratch.rest(exec));
}

}  // namespace ssmcore
