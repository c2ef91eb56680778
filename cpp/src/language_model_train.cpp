// Training a language model: the loss and its gradients.
#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "language_model_parts.h"
#include "memory.h"
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

// Positions whose logits exist at a time: enough for matrix products to be efficient. On a GPU more
// where the vocabulary is small.
int64_t head_tokens(int64_t vocab_size, Device device) {
  constexpr int64_t kTokens = 512, kGpuLogits = 1 << 25;
  return device.type == DeviceType::cpu ? kTokens : std::max(kTokens, kGpuLogits / vocab_size);
}

// Contiguous (batch, seqlen, n) as (batch · seqlen, n).
TensorView flat(const TensorView& tensor) {
  TensorView rows = tensor.select(0, 0);
  rows.shape[0] = tensor.shape[0] * tensor.shape[1];
  return rows;
}

// (batch, seqlen) integers of any strides, one after another.
std::vector<int64_t> flat_integers(const TensorView& tensor) {
  std::vector<int64_t> integers;
  integers.reserve(static_cast<size_t>(tensor.numel()));
  for (int64_t b = 0; b < tensor.shape[0]; ++b)
    for (int64_t t = 0; t < tensor.shape[1]; ++t)
      integers.push_back(
          integer_at(tensor.data, tensor.dtype, b * tensor.strides[0] + t * tensor.strides[1]));
  return integers;
}

bool is_on_host(const TensorView& tensor) {
  return tensor.device == Device{};
}

std::vector<int32_t> flat_ends(const TensorView& cu_seqlens) {
  std::vector<int32_t> ends;
  for (int64_t s = 0; s < cu_seqlens.shape[0]; ++s)
    ends.push_back(cu_seqlens.as<const int32_t>()[s * cu_seqlens.strides[0]]);
  return ends;
}

// The token ids or targets of a step, one after another in memory of its device.
struct Integers {
  std::vector<int64_t> gathered;  // where they lie apart
  TensorView given, device;       // (tokens)

  void place(const TensorView& integers, Device on, Scratch& scratch) {
    const int64_t size = integers.numel();
    given = TensorView(integers.data, integers.dtype, {size}, integers.device);
    if (!integers.is_contiguous()) {
      gathered = flat_integers(integers);
      given = TensorView(gathered.data(), DType::int64, {size});
    }
    device = given.device == on ? given : scratch.tensor(given.dtype, {size}, on);
  }

  void upload(const Exec& exec) const {
    if (device.device != given.device)
      copy_bytes(exec.context, device.data, given.data, given.nbytes(), exec.stream);
  }
};

}  // namespace

// One step: the operators' operands, placed in the caller's tensors and the scratch.
class LanguageModel::TrainingStep {
 public:
  TrainingStep(const LanguageModel& model, const LanguageModelTrainArgs& args,
               const Context& context, Scratch& scratch);

  size_t largest_workspace(const Context& context) const;
  // Only when it runs: the memory of arguments that ask for a size may be made up.
  void check_overlap() const;
  void run(const Exec& exec) const;

 private:
  // Positions [begin, begin + length) of the head, in the order in which they run.
  struct Head {
    LinearArgs logits;
    CrossEntropyFwdArgs loss;
    CrossEntropyBwdArgs loss_bwd;
    LinearBwdArgs logits_bwd;
  };

  void check(const Checks& check) const;
  // What the sum of losses is divided by; 0 where that is counted on a GPU.
  int64_t num_targets(const Checks& check) const;

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
  MixerTrainArgs mixer(size_t i) const {
    return {normed_, cu_seqlens_, args_.cu_seqlens, saved_[i]};
  }
  Gradient head_gradient() const;
  Head head(int64_t begin, int64_t length) const;
  EmbeddingBwdArgs embedding_bwd() const;

  void forward(const Exec& exec) const;
  void loss(const Exec& exec) const;
  void backward(const Exec& exec) const;

  const LanguageModel& model_;
  const LanguageModelTrainArgs& args_;
  int64_t tokens_, d_model_;
  Integers token_ids_, targets_;
  TensorView cu_seqlens_;              // of the device
  std::vector<TensorView> residuals_;  // what enters each norm: (tokens, d_model), float32
  std::vector<void*> saved_;     // of each layer's mixer; layers that are computed again share one
  TensorView normed_, dnormed_;  // (batch, seqlen, d_model)
  TensorView hidden_;            // (batch, seqlen, d_model): also its gradient
  TensorView dresidual_;         // (tokens, d_model), float32
  TensorView logits_, lse_;      // of head_tokens() positions, float32
  TensorView dlogits_;           // like logits_: on a GPU bfloat16 where activations are
  TensorView position_loss_;     // (tokens), float32
  TensorView loss_weight_;       // (1), float32: the loss by each position's loss
  int64_t num_targets_ = 0;
};

LanguageModel::TrainingStep::TrainingStep(const LanguageModel& model,
                                          const LanguageModelTrainArgs& args,
                                          const Context& context, Scratch& scratch)
    : model_(model), args_(args), d_model_(model.config().d_model) {
  const Device device = context.device();
  check(Checks(kOp, device));
  token_ids_.place(args.token_ids, device, scratch);
  targets_.place(args.targets, device, scratch);
  num_targets_ = num_targets(Checks(kOp, device));
  cu_seqlens_ = args.cu_seqlens;
  if (cu_seqlens_ && !(device == Device{}))
    cu_seqlens_ = scratch.tensor(DType::int32, {cu_seqlens_.shape[0]}, device);
  const int64_t batch = args.token_ids.shape[0], seqlen = args.token_ids.shape[1];
  tokens_ = batch * seqlen;
  const auto stream = [&] { return scratch.tensor(DType::float32, {tokens_, d_model_}, device); };
  const auto activation = [&] {
    return scratch.tensor(model.dtype(), {batch, seqlen, d_model_}, device);
  };
  for (size_t i = 0; i <= num_layers(); ++i) residuals_.push_back(stream());
  dresidual_ = stream();
  normed_ = activation();
  dnormed_ = activation();
  hidden_ = activation();
  const int64_t vocab_size = model.config().vocab_size;
  const int64_t positions = std::min(tokens_, head_tokens(vocab_size, device));
  logits_ = dlogits_ = scratch.tensor(DType::float32, {positions, vocab_size}, device);
  // But for float16, which would round gradients of unlikely tokens to 0.
  if (!(device == Device{}) && model.dtype() == DType::bfloat16)
    dlogits_ = scratch.tensor(model.dtype(), {positions, vocab_size}, device);
  position_loss_ = scratch.tensor(DType::float32, {tokens_}, device);
  loss_weight_ = scratch.tensor(DType::float32, {1}, device);
  lse_ = scratch.tensor(DType::float32, {positions}, device);

  std::vector<size_t> sizes;
  for (const Layer& layer : model.layers_)
    sizes.push_back(layer.mixer->saved_size({normed_, cu_seqlens_, args.cu_seqlens}, context));
  void* shared = args.recompute_layers
                     ? scratch.bytes(*std::max_element(sizes.begin(), sizes.end()))
                     : nullptr;
  for (const size_t size : sizes) saved_.push_back(shared ? shared : scratch.bytes(size));
}

void LanguageModel::TrainingStep::check(const Checks& check) const {
  check.rank(args_.token_ids, "token_ids", 2, "(batch, seqlen)");
  const Device device = model_.context().device();
  check.require(check.device() == device, [&] {
    return "the model is on " + to_string(device) + ", the context is of " +
           to_string(check.device());
  });
  const Dim batch{"batch", args_.token_ids.shape[0]}, seqlen{"seqlen", args_.token_ids.shape[1]};
  const Checks check_host(kOp, {});
  for (const Named& integers :
       {Named{args_.token_ids, "token_ids"}, Named{args_.targets, "targets"}}) {
    const bool on_host = is_on_host(integers.tensor);
    (on_host ? check_host : check)
        .input(integers.tensor, integers.name, {batch, seqlen}, {DType::int32, DType::int64});
    check.require(on_host || integers.tensor.is_contiguous(), [&] {
      return std::string(integers.name) + " is on " + to_string(device) + " and not contiguous";
    });
  }
  if (is_on_host(args_.token_ids))
    check_host.token_ids(args_.token_ids, model_.config().vocab_size);
  if (args_.cu_seqlens) check_host.cu_seqlens(args_.cu_seqlens, batch.size, seqlen.size);
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
    check.require(tensor.device == device && tensor.data,
                  [&] { return what() + " has no memory on " + to_string(device); });
  }
}

void LanguageModel::TrainingStep::check_overlap() const {
  struct Piece {
    const char *begin, *end;
    std::string name;
    bool is_written;
  };
  std::vector<Piece> pieces;
  const auto add = [&](const TensorView& tensor, const std::string& name, bool is_written) {
    const char* begin = tensor.as<const char>();
    pieces.push_back({begin, begin + tensor.nbytes(), name, is_written});
  };
  for (const auto& [name, gradient] : args_.gradients)
    add(gradient.tensor, "the gradient of " + name, true);
  add(args_.loss, "loss", true);
  if (model_.trainable())
    for (const auto& [name, parameter] : model_.parameters()) add(parameter, name, false);
  std::sort(pieces.begin(), pieces.end(),
            [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
  const Piece* reaches_on = nullptr;
  for (const Piece& piece : pieces) {
    Checks(kOp, {}).require(!reaches_on || reaches_on->end <= piece.begin ||
                                !(reaches_on->is_written || piece.is_written),
                            [&] { return reaches_on->name + " overlaps " + piece.name; });
    if (!reaches_on || piece.end > reaches_on->end) reaches_on = &piece;
  }
}

int64_t LanguageModel::TrainingStep::num_targets(const Checks& check) const {
  const int64_t vocab_size = model_.config().vocab_size;
  const TensorView& targets = targets_.given;
  if (!is_on_host(targets)) return args_.num_targets;
  int64_t count = 0;
  for (int64_t i = 0; i < targets.shape[0]; ++i) {
    const int64_t target = integer_at(targets.data, targets.dtype, i);
    if (target == kIgnoredTarget) continue;
    check.require(target >= 0 && target < vocab_size, [&] {
      return "targets holds " + std::to_string(target) + " at position " + std::to_string(i) +
             ", expected 0 to " + std::to_string(vocab_size - 1) + ", or " +
             std::to_string(kIgnoredTarget) + " to ignore it";
    });
    ++count;
  }
  if (args_.num_targets > 0) return args_.num_targets;
  check.require(count > 0, [] { return std::string("targets holds nothing that is not ignored"); });
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
  const TensorView logits = logits_.slice(0, 0, length), lse = lse_.slice(0, 0, length),
                   dlogits = dlogits_.slice(0, 0, length);
  Head head;
  head.logits = {part(flat(normed_)), model_.head_, {}, logits};
  head.loss.logits = logits;
  head.loss.targets = part(targets_.device);
  head.loss.ignore_index = kIgnoredTarget;
  head.loss.loss = part(position_loss_);
  head.loss.lse = lse;
  head.loss_bwd.logits = logits;
  head.loss_bwd.targets = part(targets_.device);
  head.loss_bwd.ignore_index = kIgnoredTarget;
  head.loss_bwd.lse = lse;
  head.loss_bwd.dloss = loss_weight_;
  head.loss_bwd.dloss.shape[0] = length;
  head.loss_bwd.dloss.strides[0] = 0;
  head.loss_bwd.dlogits = {dlogits};
  head.logits_bwd.x = part(flat(normed_));
  head.logits_bwd.weight = model_.head_;
  head.logits_bwd.dout = dlogits;
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
  args.token_ids = token_ids_.device;
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

void LanguageModel::TrainingStep::run(const Exec& exec) const {
  token_ids_.upload(exec);
  targets_.upload(exec);
  if (cu_seqlens_.data != args_.cu_seqlens.data) {
    const std::vector<int32_t> ends = flat_ends(args_.cu_seqlens);
    copy_bytes(exec.context, cu_seqlens_.data, ends.data(), sizeof(int32_t) * ends.size(),
               exec.stream);
  }
  forward(exec);
  loss(exec);
  backward(exec);
}

void LanguageModel::TrainingStep::forward(const Exec& exec) const {
  embedding({token_ids_.device, model_.embedding_, residuals_[0]}, exec);
  for (size_t i = 0; i < num_layers(); ++i) {
    rms_norm_fwd(norm(i), exec);
    model_.layers_[i].mixer->train_forward(mixer(i), hidden_, exec);
  }
  rms_norm_fwd(norm(num_layers()), exec);
}

void LanguageModel::TrainingStep::loss(const Exec& exec) const {
  if (const Gradient dweight = head_gradient(); dweight.tensor && !dweight.accumulate) {
    // Rows that only pad the vocabulary.
    const int64_t used = model_.config().vocab_size * d_model_;
    zero_bytes(exec.context, dweight.tensor.as<float>() + used,
               sizeof(float) * static_cast<size_t>(dweight.tensor.numel() - used), exec.stream);
  }
  const KernelTable& kernels = kernel_table(exec.context);
  const LossWeightParams weight{
      targets_.device.dtype,   tokens_, kIgnoredTarget, num_targets_, Strided<1>(targets_.device),
      loss_weight_.as<float>()};
  launch(kOp, kernels.loss_weight, weight, exec);
  const int64_t positions = logits_.shape[0];
  for (int64_t begin = 0; begin < tokens_; begin += positions) {
    const Head part = head(begin, std::min(positions, tokens_ - begin));
    linear(part.logits, exec);
    cross_entropy_fwd(part.loss, exec);
    cross_entropy_bwd(part.loss_bwd, exec);
    linear_bwd(part.logits_bwd, exec);
  }
  const LossSumParams sum{tokens_, position_loss_.as<float>(), loss_weight_.as<float>(),
                          args_.loss.as<float>()};
  launch(kOp, kernels.loss_sum, sum, exec);
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
  const TrainingStep step(*this, args, exec.context, scratch);
  Checks(kOp, exec.context.device())
      .workspace(exec, scratch.used() + step.largest_workspace(exec.context));
  step.check_overlap();
  step.run(scratch.rest(exec));
}

}  // namespace ssmcore
