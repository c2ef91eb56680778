// The C interface: language models and their states.
#include "c_api_model.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "ssmcore/initial_checkpoint.h"

struct ssmcore_state {
  std::shared_ptr<const ssmcore::c_api::HeldModel> model;
  ssmcore::ModelState state;
};

namespace ssmcore::c_api {
namespace {

constexpr const char* kModel = "language_model";
constexpr const char* kTraining = "loss_and_gradients";

ModelState* to_state(ssmcore_state* state) {
  return state ? &state->state : nullptr;
}

LanguageModelFwdArgs lower(const ssmcore_model_prefill_args& c) {
  const TensorReader tensor(kModel);
  LanguageModelFwdArgs args;
  args.token_ids = tensor(c.token_ids, "token_ids");
  args.cu_seqlens = tensor(c.cu_seqlens, "cu_seqlens");
  args.state = to_state(c.state);
  args.state_indices = tensor(c.state_indices, "state_indices");
  args.logits = tensor(c.logits, "logits");
  return args;
}

// A step is a sequence of one token a row.
LanguageModelFwdArgs lower(const ssmcore_model_step_args& c) {
  const TensorReader tensor(kModel);
  LanguageModelFwdArgs args;
  args.token_ids = tensor(c.token_ids, "token_ids");
  if (args.token_ids.rank > 1)
    throw Error(ErrorCode::invalid_argument, std::string(kModel) + ": token_ids has shape " +
                                                 args.token_ids.shape_string() +
                                                 ", expected (rows)");
  if (args.token_ids) args.token_ids = args.token_ids.unsqueeze(1);
  args.state = to_state(c.state);
  args.state_indices = tensor(c.state_indices, "state_indices");
  args.logits = tensor(c.logits, "logits");
  return args;
}

LanguageModelTrainArgs lower(const ssmcore_model_loss_and_gradients_args& c) {
  const TensorReader tensor(kTraining);
  LanguageModelTrainArgs args;
  args.token_ids = tensor(c.token_ids, "token_ids");
  args.targets = tensor(c.targets, "targets");
  args.cu_seqlens = tensor(c.cu_seqlens, "cu_seqlens");
  args.num_targets = c.num_targets;
  args.recompute_layers = c.recompute_layers != 0;
  args.loss = tensor(c.loss, "loss");
  if (c.num_gradients < 0)
    throw Error(ErrorCode::invalid_argument, std::string(kTraining) + ": num_gradients is " +
                                                 std::to_string(c.num_gradients) +
                                                 ", expected at least 0");
  for (int64_t i = 0; i < c.num_gradients; ++i) {
    const ssmcore_named_gradient& given = required(kTraining, "gradients", c.gradients + i);
    const char* name = &required(kTraining, "a gradient's name", given.name);
    if (!args.gradients.emplace(name, tensor(given.gradient, name)).second)
      throw Error(ErrorCode::invalid_argument,
                  std::string(kTraining) + ": the gradient of " + name + " is given twice");
  }
  return args;
}

// A model of open(op), a checkpoint.
template <typename Open>
ssmcore_status make_model(const char* op, const ssmcore_context* context,
                          const ssmcore_model_options* options, ssmcore_model** model,
                          const Open& open) {
  return guarded([&] {
    required(op, "model", model) = nullptr;
    const std::shared_ptr<HeldContext>& held = required(op, "context", context).held;
    const ssmcore_model_options given = read_options(op, options);
    LoadOptions load_options;
    load_options.trainable = given.trainable != 0;
    if (given.dtype.bits != 0)
      load_options.dtype = to_dtype(std::string(op) + ": the model", given.dtype);
    *model = new ssmcore_model{std::shared_ptr<HeldModel>(
        new HeldModel{held, LanguageModel(open(op), held->context, load_options)})};
  });
}

// 0 for ids that forward() will refuse.
size_t workspace_size(const HeldModel& held, const TensorView& token_ids) {
  if (token_ids.rank != 2 || token_ids.numel() == 0) return 0;
  return held.model.workspace_size(token_ids.shape[0], token_ids.shape[1], held.context->context);
}

template <typename CArgs>
ssmcore_status query(const ssmcore_model* model, const CArgs* c_args, size_t* bytes) {
  return guarded([&] {
    const HeldModel& held = *required(kModel, "model", model).held;
    const LanguageModelFwdArgs args = lower(read_struct(kModel, "args", c_args));
    required(kModel, "bytes", bytes) = workspace_size(held, args.token_ids);
  });
}

template <typename CArgs>
ssmcore_status run(const ssmcore_model* model, const CArgs* c_args, void* workspace,
                   size_t workspace_bytes, void* stream) {
  return guarded([&] {
    const HeldModel& held = *required(kModel, "model", model).held;
    const LanguageModelFwdArgs args = lower(read_struct(kModel, "args", c_args));
    with_workspace(
        kModel, {held.context->context, workspace, workspace_bytes, stream},
        [&] { return workspace_size(held, args.token_ids); },
        [&](const Exec& exec) { held.model.forward(args, exec); });
  });
}

ssmcore_model_info describe(const LanguageModel& model) {
  const ModelConfig& config = model.config();
  ssmcore_model_info info{};
  info.model_type = config.model_type.c_str();
  info.dtype = from_dtype(model.dtype());
  info.num_parameters = model.num_parameters();
  info.vocab_size = config.vocab_size;
  info.d_model = config.d_model;
  info.n_layer = static_cast<int64_t>(config.layers.size());
  info.dim = config.dim;
  info.dstate = config.dstate;
  info.num_eos_token_ids = static_cast<int64_t>(config.eos_token_ids.size());
  info.eos_token_ids = config.eos_token_ids.data();
  return info;
}

}  // namespace
}  // namespace ssmcore::c_api

using namespace ssmcore;
using namespace ssmcore::c_api;

ssmcore_status ssmcore_model_load(const ssmcore_context* context, const char* folder,
                                  const ssmcore_model_options* options, ssmcore_model** model) {
  return make_model("model_load", context, options, model, [&](const char* op) {
    return open_checkpoint(&required(op, "folder", folder));
  });
}

ssmcore_status ssmcore_model_create(const ssmcore_context* context, const char* config,
                                    uint64_t seed, const ssmcore_model_options* options,
                                    ssmcore_model** model) {
  return make_model("model_create", context, options, model, [&](const char* op) {
    return initial_checkpoint(parse_model_config(&required(op, "config", config)), seed);
  });
}

ssmcore_status ssmcore_model_save(const ssmcore_model* model, const char* folder) {
  constexpr const char* kOp = "model_save";
  return guarded(
      [&] { required(kOp, "model", model).held->model.save(&required(kOp, "folder", folder)); });
}

void ssmcore_model_free(ssmcore_model* model) {
  delete model;
}

ssmcore_status ssmcore_model_get_info(const ssmcore_model* model, ssmcore_model_info* info) {
  constexpr const char* kOp = "model_get_info";
  return guarded([&] {
    const size_t size = required(kOp, "info", info).struct_size;
    check_struct_size(kOp, "info", size, sizeof *info);
    ssmcore_model_info known = describe(required(kOp, "model", model).held->model);
    known.struct_size = size;
    std::memset(info, 0, size);
    std::memcpy(info, &known, std::min(size, sizeof known));
  });
}

ssmcore_status ssmcore_state_create(const ssmcore_model* model, int64_t num_slots, void* stream,
                                    ssmcore_state** state) {
  constexpr const char* kOp = "state_create";
  return guarded([&] {
    required(kOp, "state", state) = nullptr;
    const auto& held = required(kOp, "model", model).held;
    *state = new ssmcore_state{held, held->model.new_state(num_slots, stream)};
  });
}

ssmcore_status ssmcore_state_clone(const ssmcore_state* state, void* stream, ssmcore_state** copy) {
  constexpr const char* kOp = "state_clone";
  return guarded([&] {
    required(kOp, "copy", copy) = nullptr;
    const ssmcore_state& original = required(kOp, "state", state);
    *copy = new ssmcore_state{original.model, original.state.clone(stream)};
  });
}

void ssmcore_state_free(ssmcore_state* state) {
  delete state;
}

ssmcore_status ssmcore_state_num_slots(const ssmcore_state* state, int64_t* num_slots) {
  constexpr const char* kOp = "state_num_slots";
  return guarded([&] {
    required(kOp, "num_slots", num_slots) = required(kOp, "state", state).state.num_slots();
  });
}

ssmcore_status ssmcore_state_nbytes(const ssmcore_state* state, size_t* nbytes) {
  constexpr const char* kOp = "state_nbytes";
  return guarded(
      [&] { required(kOp, "nbytes", nbytes) = required(kOp, "state", state).state.nbytes(); });
}

ssmcore_status ssmcore_state_reset_slot(ssmcore_state* state, int64_t slot, void* stream) {
  return guarded(
      [&] { required("state_reset_slot", "state", state).state.reset_slot(slot, stream); });
}

ssmcore_status ssmcore_state_copy_slot(ssmcore_state* state, int64_t from, int64_t to,
                                       void* stream) {
  return guarded(
      [&] { required("state_copy_slot", "state", state).state.copy_slot(from, to, stream); });
}

ssmcore_status ssmcore_model_prefill_workspace_size(const ssmcore_model* model,
                                                    const ssmcore_model_prefill_args* args,
                                                    size_t* bytes) {
  return query(model, args, bytes);
}

ssmcore_status ssmcore_model_prefill(const ssmcore_model* model,
                                     const ssmcore_model_prefill_args* args, void* workspace,
                                     size_t workspace_bytes, void* stream) {
  return run(model, args, workspace, workspace_bytes, stream);
}

ssmcore_status ssmcore_model_step_workspace_size(const ssmcore_model* model,
                                                 const ssmcore_model_step_args* args,
                                                 size_t* bytes) {
  return query(model, args, bytes);
}

ssmcore_status ssmcore_model_step(const ssmcore_model* model, const ssmcore_model_step_args* args,
                                  void* workspace, size_t workspace_bytes, void* stream) {
  return run(model, args, workspace, workspace_bytes, stream);
}

ssmcore_status ssmcore_model_num_parameters(const ssmcore_model* model, int64_t* num_parameters) {
  constexpr const char* kOp = "model_num_parameters";
  return guarded([&] {
    required(kOp, "num_parameters", num_parameters) =
        static_cast<int64_t>(required(kOp, "model", model).held->model.parameters().size());
  });
}

ssmcore_status ssmcore_model_get_parameter(const ssmcore_model* model, int64_t index,
                                           ssmcore_model_parameter* parameter) {
  constexpr const char* kOp = "model_get_parameter";
  return guarded([&] {
    const size_t size = required(kOp, "parameter", parameter).struct_size;
    check_struct_size(kOp, "parameter", size, sizeof *parameter);
    const auto& parameters = required(kOp, "model", model).held->model.parameters();
    const auto count = static_cast<int64_t>(parameters.size());
    if (index < 0 || index >= count)
      throw Error(ErrorCode::invalid_argument, std::string(kOp) + ": index is " +
                                                   std::to_string(index) + ", expected 0 to " +
                                                   std::to_string(count - 1));
    const auto& [name, tensor] = *std::next(parameters.begin(), index);
    ssmcore_model_parameter known{};
    known.struct_size = size;
    known.name = name.c_str();
    known.tensor.data = tensor.data;
    known.tensor.device = {
        tensor.device.type == DeviceType::cuda ? SSMCORE_DEVICE_CUDA : SSMCORE_DEVICE_CPU,
        tensor.device.index};
    known.tensor.ndim = tensor.rank;
    known.tensor.dtype = from_dtype(tensor.dtype);
    known.tensor.shape = tensor.shape;
    std::memset(parameter, 0, size);
    std::memcpy(parameter, &known, std::min(size, sizeof known));
  });
}

ssmcore_status ssmcore_model_refresh(ssmcore_model* model) {
  return guarded([&] { required("model_refresh", "model", model).held->model.refresh(); });
}

ssmcore_status ssmcore_model_loss_and_gradients_workspace_size(
    const ssmcore_model* model, const ssmcore_model_loss_and_gradients_args* args, size_t* bytes) {
  return guarded([&] {
    const HeldModel& held = *required(kTraining, "model", model).held;
    required(kTraining, "bytes", bytes) = held.model.loss_and_gradients_workspace_size(
        lower(read_struct(kTraining, "args", args)), held.context->context);
  });
}

ssmcore_status ssmcore_model_loss_and_gradients(const ssmcore_model* model,
                                                const ssmcore_model_loss_and_gradients_args* c_args,
                                                void* workspace, size_t workspace_bytes,
                                                void* stream) {
  return guarded([&] {
    const HeldModel& held = *required(kTraining, "model", model).held;
    const LanguageModelTrainArgs args = lower(read_struct(kTraining, "args", c_args));
    with_workspace(
        kTraining, {held.context->context, workspace, workspace_bytes, stream},
        [&] { return held.model.loss_and_gradients_workspace_size(args, held.context->context); },
        [&](const Exec& exec) { held.model.loss_and_gradients(args, exec); });
  });
}
