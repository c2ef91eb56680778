#include "ssmcore/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "checks.h"
#include "memory.h"
#include "new_file.h"
#include "safetensors.h"
#include "scratch.h"
#include "ssmcore/adamw.h"
#include "ssmcore/checkpoint.h"
#include "ssmcore/error.h"
#include "strided.h"

namespace ssmcore {
namespace {

constexpr char kOp[] = "trainer";
constexpr char kStep[] = "step";

// Matrices and the convolution's weight do; A_log, D, biases and norms do not.
bool does_decay(const std::string& name, const TensorView& weight) {
  const std::string exception = ".A_log";
  return weight.rank > 1 &&
         (name.size() < exception.size() ||
          name.compare(name.size() - exception.size(), exception.size(), exception) != 0);
}

TensorView like(const TensorView& weight, Scratch& scratch) {
  TensorView tensor = weight;
  tensor.data = scratch.floats(weight.numel());
  return tensor;
}

void check_options(const TrainerOptions& options) {
  const Checks check(kOp, {});
  const auto number = [&](const char* name, double value, double most) {
    check.require(value >= 0 && value <= most, [&] {
      return std::string(name) + " is " + std::to_string(value) + ", expected a number from 0" +
             (std::isfinite(most) ? " to " + std::to_string(most) : " on");
    });
  };
  constexpr double kLargest = 1e30;
  number("lr", options.lr, kLargest);
  number("final_lr", options.final_lr, 1);
  number("beta1", options.beta1, std::nextafter(1.0, 0.0));
  number("beta2", options.beta2, std::nextafter(1.0, 0.0));
  number("eps", options.eps, kLargest);
  number("weight_decay", options.weight_decay, kLargest);
  number("max_grad_norm", options.max_grad_norm, kLargest);
  for (const auto& [name, value] : {std::pair{"warmup_steps", options.warmup_steps},
                                    {"total_steps", options.total_steps},
                                    {"micro_batch", options.micro_batch}})
    check.require(value >= 0, [&, name = name, value = value] {
      return std::string(name) + " is " + std::to_string(value) + ", expected at least 0";
    });
  check.require(options.total_steps == 0 || options.total_steps >= options.warmup_steps, [&] {
    return "warmup_steps is " + std::to_string(options.warmup_steps) + ", expected at most the " +
           std::to_string(options.total_steps) + " of total_steps";
  });
}

int64_t count_targets(const TensorView& targets) {
  int64_t count = 0;
  for (int64_t b = 0; b < targets.shape[0]; ++b)
    for (int64_t t = 0; t < targets.shape[1]; ++t)
      count += integer_at(targets.data, targets.dtype,
                          b * targets.strides[0] + t * targets.strides[1]) != kIgnoredTarget;
  return count;
}

std::string gibibytes(size_t bytes) {
  const std::string tenths = std::to_string(bytes / ((size_t{1} << 30) / 10));
  return (tenths.size() > 1 ? tenths.substr(0, tenths.size() - 1) : "0") + "." + tenths.back() +
         " GiB";
}

}  // namespace

Trainer::Trainer(LanguageModel& model, const TrainerOptions& options, void* stream)
    : model_(model), options_(options), stream_(stream) {
  check_options(options);
  Checks(kOp, {}).require(model.trainable(),
                          [] { return std::string("the model is not trainable"); });
  const Context& context = model.context();
  for (const auto& [name, weight] : model.parameters())
    parameters_[name] = {weight, {}, {}, {}, does_decay(name, weight)};
  // Placed nowhere first, for the sizes, then in the memory.
  const auto place = [&](Scratch gradients, Scratch state) {
    for (auto& [name, parameter] : parameters_) {
      const TensorView& weight = parameter.weight;
      parameter.gradient = like(weight, gradients);
      parameter.exp_avg = like(weight, state);
      parameter.exp_avg_sq = like(weight, state);
    }
    return std::pair{gradients.used(), state.used()};
  };
  const auto [gradient_bytes, state_bytes] = place(Scratch::nowhere(), Scratch::nowhere());
  gradients_ = Buffer(context.allocator(), gradient_bytes, "gradients", stream);
  state_ = Buffer(context.allocator(), state_bytes, "the optimiser's moments", stream);
  place(Scratch(gradients_.data()), Scratch(state_.data()));
  // What lies between gradients is 0 and stays so: their norm is that of the whole.
  zero_bytes(context, gradients_.data(), gradient_bytes, stream);
  zero_bytes(context, state_.data(), state_bytes, stream);
  all_gradients_ = gradients_.view(DType::float32, {static_cast<int64_t>(gradient_bytes / 4)});
  sum_ = Buffer(context.allocator(), sizeof(double), "a sum of squares", stream);
}

double Trainer::lr(int64_t step) const {
  const double peak = options_.lr;
  if (step < options_.warmup_steps)
    return peak * static_cast<double>(step) / static_cast<double>(options_.warmup_steps);
  if (options_.total_steps == 0) return peak;
  const int64_t falling = options_.total_steps - options_.warmup_steps;
  const int64_t fallen = std::min(step - options_.warmup_steps, falling);
  const double part = falling > 0 ? static_cast<double>(fallen) / static_cast<double>(falling) : 0;
  constexpr double kPi = 3.14159265358979323846;
  return peak * (options_.final_lr + (1 - options_.final_lr) * 0.5 * (1 + std::cos(kPi * part)));
}

TrainerStep Trainer::step(const TensorView& token_ids, const TensorView& targets) {
  const float loss = loss_and_gradients(token_ids, targets);
  const double sum = sum_of_squares(all_gradients_);
  if (!std::isfinite(loss) || !std::isfinite(sum))
    throw Error(ErrorCode::not_finite, std::string(kOp) + ": step " +
                                           std::to_string(steps_taken_ + 1) + ": " +
                                           first_not_finite() + " is not finite (the loss is " +
                                           std::to_string(loss) + "); nothing was updated");

  AdamWArgs args;
  args.step = steps_taken_ + 1;
  args.lr = lr(args.step);
  args.beta1 = options_.beta1;
  args.beta2 = options_.beta2;
  args.eps = options_.eps;
  args.sum_of_squares = sum_.view(DType::float64, {1});
  args.max_norm = options_.max_grad_norm;
  for (const auto& [name, parameter] : parameters_) {
    args.parameter = parameter.weight;
    args.gradient = parameter.gradient;
    args.exp_avg = parameter.exp_avg;
    args.exp_avg_sq = parameter.exp_avg_sq;
    args.weight_decay = parameter.decays ? options_.weight_decay : 0;
    adamw(args, Exec{model_.context(), stream_});
  }
  model_.refresh(stream_);
  steps_taken_ = args.step;
  return {args.step, loss, static_cast<float>(std::sqrt(sum)), static_cast<float>(args.lr)};
}

float Trainer::loss_and_gradients(const TensorView& token_ids, const TensorView& targets) {
  const Checks check(kOp, {});
  check.rank(token_ids, "token_ids", 2, "(batch, seqlen)");
  const int64_t batch = token_ids.shape[0], seqlen = token_ids.shape[1];
  check.input(token_ids, "token_ids", {{"batch", batch}, {"seqlen", seqlen}},
              {DType::int32, DType::int64});
  check.input(targets, "targets", {{"batch", batch}, {"seqlen", seqlen}},
              {DType::int32, DType::int64});
  const Context& context = model_.context();
  const int64_t rows = options_.micro_batch > 0 ? std::min(options_.micro_batch, batch) : batch;
  const int64_t parts = ceil_div(batch, rows);
  if (const size_t bytes = static_cast<size_t>(parts) * sizeof(float); losses_.bytes() < bytes)
    losses_ = Buffer(context.allocator(), bytes, "losses", stream_);
  LanguageModelTrainArgs args;
  args.num_targets = count_targets(targets);
  check.require(args.num_targets > 0, [] { return std::string("targets holds nothing to learn"); });
  args.recompute_layers = options_.recompute_layers;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part * rows, count = std::min(rows, batch - begin);
    args.token_ids = token_ids.slice(0, begin, count);
    args.targets = targets.slice(0, begin, count);
    args.loss = losses_.view(DType::float32, {parts}).slice(0, part, 1);
    for (const auto& [name, parameter] : parameters_)
      args.gradients[name] = {parameter.gradient, part > 0};
    make_room(args);
    model_.loss_and_gradients(args, Exec{context, stream_, workspace_.data(), workspace_.bytes()});
  }
  std::vector<float> losses(static_cast<size_t>(parts));
  copy_bytes(context, losses.data(), losses_.data(), losses.size() * sizeof(float), stream_);
  context.synchronize(stream_);
  return static_cast<float>(std::accumulate(losses.begin(), losses.end(), 0.0));
}

void Trainer::make_room(const LanguageModelTrainArgs& args) {
  const int64_t* shape = args.token_ids.shape;
  if (std::equal(room_for_, room_for_ + 2, shape)) return;
  const size_t needed = model_.loss_and_gradients_workspace_size(args, model_.context());
  room_for_[0] = 0;
  if (needed > workspace_.bytes()) allocate_workspace(needed, args.token_ids);
  std::copy(shape, shape + 2, room_for_);
}

void Trainer::allocate_workspace(size_t needed, const TensorView& token_ids) {
  const Context& context = model_.context();
  workspace_ = {};
  const auto fail = [&] {
    throw Error(
        ErrorCode::out_of_memory,
        std::string(kOp) + ": " + std::to_string(token_ids.shape[0]) + " rows of " +
            std::to_string(token_ids.shape[1]) + " tokens need " + gibibytes(needed) +
            " for their activations, more than " + to_string(context.device()) +
            " has left; accumulate the gradients of fewer rows at a time (micro_batch)" +
            (options_.recompute_layers ? "" : ", or compute layers again (recompute_layers)"));
  };
  // Memory of the host is promised before it is there.
  if (context.device() == Device{} && needed > available_host_memory()) fail();
  try {
    workspace_ = Buffer(context.allocator(), needed, "activations", stream_);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::out_of_memory) throw;
    fail();
  }
}

double Trainer::sum_of_squares(const TensorView& x) {
  const Context& context = model_.context();
  const SumOfSquaresArgs args{x, sum_.view(DType::float64, {1})};
  const size_t needed = sum_of_squares_workspace_size(args, context);
  if (needed > workspace_.bytes())
    workspace_ = Buffer(context.allocator(), needed, "a sum of squares", stream_);
  ssmcore::sum_of_squares(args, Exec{context, stream_, workspace_.data(), workspace_.bytes()});
  double sum = 0;
  copy_bytes(context, &sum, sum_.data(), sizeof(sum), stream_);
  context.synchronize(stream_);
  return sum;
}

std::string Trainer::first_not_finite() {
  for (const auto& [name, parameter] : parameters_)
    if (!std::isfinite(sum_of_squares(parameter.weight))) return name;
  for (const auto& [name, parameter] : parameters_)
    if (!std::isfinite(sum_of_squares(parameter.gradient))) return "the gradient of " + name;
  return "the loss";
}

template <typename Visit>
void Trainer::for_each_saved(const Visit& visit) const {
  for (const auto& [name, parameter] : parameters_) {
    visit("weight." + name, parameter.weight);
    visit("exp_avg." + name, parameter.exp_avg);
    visit("exp_avg_sq." + name, parameter.exp_avg_sq);
  }
}

void Trainer::save(const std::string& path) const {
  const Context& context = model_.context();
  std::vector<std::vector<char>> copies;  // of what is in memory of a GPU
  std::vector<NamedTensor> tensors;
  for_each_saved([&](const std::string& name, TensorView tensor) {
    if (tensor.device.type != DeviceType::cpu) {
      copies.emplace_back(tensor.nbytes());
      copy_bytes(context, copies.back().data(), tensor.data, copies.back().size(), stream_);
      tensor.data = copies.back().data();
      tensor.device = {};
    }
    tensors.emplace_back(name, tensor);
  });
  context.synchronize(stream_);
  int64_t steps = steps_taken_;
  tensors.emplace_back(kStep, TensorView(&steps, DType::int64, {1}));
  NewFile file(kOp, path);
  write_safetensors(kOp, std::move(tensors), file);
  file.flush();
  file.publish();
}

void Trainer::load(const std::string& path) {
  const TensorMap stored = open_safetensors(path);
  const auto fail = [&](const std::string& reason) {
    throw Error(ErrorCode::invalid_checkpoint, std::string(kOp) + ": " + path + ": " + reason);
  };
  // All is checked before any of it is taken.
  size_t known = 1;
  const auto find = [&](const std::string& name, const TensorView& expected) {
    const auto found = stored.tensors.find(name);
    if (found == stored.tensors.end()) fail("tensor " + name + " is missing");
    const TensorView& tensor = found->second;
    if (tensor.dtype != expected.dtype || tensor.shape_string() != expected.shape_string())
      fail("tensor " + name + " is " + dtype_name(tensor.dtype) + " of shape " +
           tensor.shape_string() + ", expected " + dtype_name(expected.dtype) + " of shape " +
           expected.shape_string());
    return tensor;
  };
  int64_t steps = 0;
  const TensorView step = find(kStep, TensorView(&steps, DType::int64, {1}));
  for_each_saved([&](const std::string& name, const TensorView& tensor) {
    find(name, tensor);
    ++known;
  });
  if (stored.tensors.size() != known) fail("it holds tensors of another model");

  const Context& context = model_.context();
  for_each_saved([&](const std::string& name, const TensorView& tensor) {
    copy_bytes(context, tensor.data, stored.tensors.at(name).data, tensor.nbytes(), stream_);
  });
  context.synchronize(stream_);
  std::memcpy(&steps, step.data, sizeof(steps));
  model_.refresh(stream_);
  steps_taken_ = steps;
}

}  // namespace ssmcore
