// The C interface: training.
#include <algorithm>
#include <cstring>

#include "c_api_model.h"
#include "ssmcore/trainer.h"

struct ssmcore_trainer {
  std::shared_ptr<ssmcore::c_api::HeldModel> model;
  ssmcore::Trainer trainer;
};

namespace ssmcore::c_api {
namespace {

constexpr const char* kOp = "trainer";

// 0 stands for the default; below 0 there is none of it.
double or_none(double given, double otherwise) {
  return given == 0 ? otherwise : std::max(given, 0.0);
}

TrainerOptions lower(const ssmcore_trainer_options& c) {
  TrainerOptions options;
  if (c.lr != 0) options.lr = c.lr;
  options.warmup_steps = c.warmup_steps;
  options.total_steps = c.total_steps;
  if (c.final_lr != 0) options.final_lr = c.final_lr;
  if (c.beta1 != 0) options.beta1 = c.beta1;
  if (c.beta2 != 0) options.beta2 = c.beta2;
  if (c.eps != 0) options.eps = c.eps;
  options.weight_decay = or_none(c.weight_decay, options.weight_decay);
  options.max_grad_norm = or_none(c.max_grad_norm, options.max_grad_norm);
  options.micro_batch = c.micro_batch;
  options.recompute_layers = c.recompute_layers != 0;
  return options;
}

}  // namespace
}  // namespace ssmcore::c_api

using namespace ssmcore;
using namespace ssmcore::c_api;

ssmcore_status ssmcore_trainer_create(ssmcore_model* model, const ssmcore_trainer_options* options,
                                      void* stream, ssmcore_trainer** trainer) {
  return guarded([&] {
    required(kOp, "trainer", trainer) = nullptr;
    const auto& held = required(kOp, "model", model).held;
    *trainer =
        new ssmcore_trainer{held, Trainer(held->model, lower(read_options(kOp, options)), stream)};
  });
}

void ssmcore_trainer_free(ssmcore_trainer* trainer) {
  delete trainer;
}

ssmcore_status ssmcore_trainer_step(ssmcore_trainer* trainer, const ssmcore_tensor* token_ids,
                                    const ssmcore_tensor* targets, ssmcore_trainer_result* result) {
  return guarded([&] {
    const size_t size = result ? result->struct_size : 0;
    if (result) check_struct_size(kOp, "result", size, sizeof *result);
    const TensorReader tensor(kOp);
    const TrainerStep step =
        required(kOp, "trainer", trainer)
            .trainer.step(tensor(token_ids, "token_ids"), tensor(targets, "targets"));
    if (!result) return;
    const ssmcore_trainer_result known{size, step.step, step.loss, step.grad_norm, step.lr};
    std::memset(result, 0, size);
    std::memcpy(result, &known, std::min(size, sizeof known));
  });
}

ssmcore_status ssmcore_trainer_steps_taken(const ssmcore_trainer* trainer, int64_t* steps_taken) {
  return guarded([&] {
    required(kOp, "steps_taken", steps_taken) =
        required(kOp, "trainer", trainer).trainer.steps_taken();
  });
}

ssmcore_status ssmcore_trainer_save(const ssmcore_trainer* trainer, const char* path) {
  return guarded(
      [&] { required(kOp, "trainer", trainer).trainer.save(&required(kOp, "path", path)); });
}

ssmcore_status ssmcore_trainer_load(ssmcore_trainer* trainer, const char* path) {
  return guarded(
      [&] { required(kOp, "trainer", trainer).trainer.load(&required(kOp, "path", path)); });
}
