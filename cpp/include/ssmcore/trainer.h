// Training a language model with AdamW.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "ssmcore/buffer.h"
#include "ssmcore/language_model.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

struct TrainerOptions {
  double lr = 1e-3;          // at its peak, which it reaches linearly
  int64_t warmup_steps = 0;  // at this step,
  int64_t total_steps = 0;   // to fall along half a cosine until this one; 0: to stay
  double final_lr = 0.1;     // to this part of the peak

  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0.1;  // of matrices; A_log, D, biases and norms do not decay
  double max_grad_norm = 1;   // gradients are clipped to it, all together; 0: never

  // Rows of a batch whose gradients are computed at a time; 0: all. Memory for activations grows
  // with it.
  int64_t micro_batch = 0;
  bool recompute_layers = false;  // as in LanguageModelTrainArgs
};

struct TrainerStep {
  int64_t step = 0;     // the number of this step, from 1
  float loss = 0;       // mean cross entropy before the step, in nats
  float grad_norm = 0;  // before clipping
  float lr = 0;
};

// What a run needs besides the model: gradients and AdamW's moments, on the model's device. The
// model must outlive it and not be used while it steps.
class Trainer {
 public:
  // Throws Error(invalid_argument) for a model that is not trainable or options out of range, and
  // Error(out_of_memory). On a GPU everything is in the order of `stream`.
  Trainer(LanguageModel& model, const TrainerOptions& options, void* stream = nullptr);

  // One step: token_ids and targets are (batch, seqlen), int32 or int64, in memory of the host, as
  // in LanguageModelTrainArgs. Throws Error(not_finite), naming the step and the first tensor, for
  // a loss or a gradient that is infinite or NaN, and Error(out_of_memory) for a batch that does
  // not fit. The model and the trainer are then as they were.
  TrainerStep step(const TensorView& token_ids, const TensorView& targets);

  int64_t steps_taken() const { return steps_taken_; }
  const TrainerOptions& options() const { return options_; }
  // Of step `step`, counted from 1.
  double lr(int64_t step) const;

  // Weights, moments and the number of steps as one safetensors file, which appears whole
  // or not at all, and back: training then goes on to the same bits. Throws Error(not_found) for a
  // path that cannot be written or read, and Error(invalid_checkpoint) for a file of another model.
  void save(const std::string& path) const;
  void load(const std::string& path);

 private:
  struct Parameter {
    TensorView weight, gradient, exp_avg, exp_avg_sq;
    bool decays;
  };

  float loss_and_gradients(const TensorView& token_ids, const TensorView& targets);
  // A workspace for it.
  void make_room(const LanguageModelTrainArgs& args);
  void allocate_workspace(size_t needed, const TensorView& token_ids);
  double sum_of_squares(const TensorView& x);
  std::string first_not_finite();
  // Calls visit(name in the file, tensor) for everything that save() stores of the parameters.
  template <typename Visit>
  void for_each_saved(const Visit& visit) const;

  LanguageModel& model_;
  TrainerOptions options_;
  void* stream_;
  Buffer gradients_, state_, sum_, losses_, workspace_;
  int64_t room_for_[2] = {};  // rows and tokens of the batch last found to fit in workspace_
  TensorView all_gradients_;  // one after another
  std::map<std::string, Parameter> parameters_;
  int64_t steps_taken_ = 0;
};

}  // namespace ssmcore
