// Checkpoints and language models.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>

#include "call.h"
#include "ssmcore/checkpoint.h"
#include "ssmcore/language_model.h"

namespace py = pybind11;

namespace ssmcore {
namespace {

// Arrays a checkpoint's views point into; released under the GIL, wherever the last user ends.
std::shared_ptr<const void> keep_alive(std::vector<Borrowed>&& arrays) {
  return std::shared_ptr<const void>(new std::vector<Borrowed>(std::move(arrays)),
                                     [](const void* kept) {
                                       const py::gil_scoped_acquire acquire;
                                       delete static_cast<const std::vector<Borrowed>*>(kept);
                                     });
}

Checkpoint checkpoint_from_tensors(const ModelConfig& config, const py::dict& tensors) {
  Checkpoint checkpoint{config, {}};
  std::vector<Borrowed> arrays;
  for (const auto& [name, array] : tensors) {
    const std::string text = name.cast<std::string>();
    arrays.push_back(borrow(array, "checkpoint: tensor " + text));
    checkpoint.tensors.tensors[text] = arrays.back().view;
  }
  checkpoint.tensors.owner = keep_alive(std::move(arrays));
  return checkpoint;
}

py::dict describe_tensors(const Checkpoint& checkpoint) {
  py::dict description;
  for (const auto& [name, tensor] : checkpoint.tensors.tensors) {
    py::tuple shape(tensor.rank);
    for (int i = 0; i < tensor.rank; ++i) shape[i] = tensor.shape[i];
    description[py::str(name)] = py::make_tuple(dtype_name(tensor.dtype), shape);
  }
  return description;
}

DType parse_dtype(const std::string& name) {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    if (name == dtype_name(dtype)) return dtype;
  throw Error(ErrorCode::invalid_argument,
              "language_model: dtype is '" + name + "', expected float32, bfloat16 or float16");
}

std::unique_ptr<LanguageModel> make_model(const Checkpoint& checkpoint, const std::string& dtype,
                                          bool trainable) {
  const LoadOptions options{parse_dtype(dtype), trainable};
  const py::gil_scoped_release release;
  return std::make_unique<LanguageModel>(checkpoint, cpu_context(), options);
}

void forward(const LanguageModel& model, py::handle token_ids, py::handle logits, ModelState& state,
             py::handle state_indices, py::handle cu_seqlens) {
  const auto array = [](py::handle object, const char* name) {
    return object.is_none() ? Borrowed() : borrow(object, std::string("language_model: ") + name);
  };
  const Borrowed ids = array(token_ids, "token_ids"), out = array(logits, "logits"),
                 indices = array(state_indices, "state_indices"),
                 packed = array(cu_seqlens, "cu_seqlens");
  if (out.read_only)
    throw Error(ErrorCode::invalid_argument,
                "language_model: logits is read-only, but would be written");
  if (ids.view.rank != 2)
    throw Error(ErrorCode::invalid_argument, "language_model: token_ids has shape " +
                                                 ids.view.shape_string() +
                                                 ", expected (batch, seqlen)");
  const LanguageModelFwdArgs args{ids.view, packed.view, &state, indices.view, out.view};
  const Context& context = cpu_context();
  const py::gil_scoped_release release;
  const std::shared_lock<std::shared_mutex> lock(calls());
  // Sizes of 0 are left to forward() to refuse.
  const bool empty = ids.view.numel() == 0;
  const Buffer workspace(
      context.allocator(),
      empty ? 0 : model.workspace_size(ids.view.shape[0], ids.view.shape[1], context),
      "a model's activations");
  model.forward(args, Exec{context, nullptr, workspace.data(), workspace.bytes()});
}

// The parameters of a trainable model, as arrays that keep it alive.
py::dict parameters(const py::object& self) {
  const auto& model = self.cast<const LanguageModel&>();
  if (!model.trainable())
    throw Error(ErrorCode::invalid_argument,
                "language_model: parameters of a model that is not trainable");
  py::dict arrays;
  for (const auto& [name, tensor] : model.parameters()) {
    const std::vector<py::ssize_t> shape(tensor.shape, tensor.shape + tensor.rank);
    arrays[py::str(name)] = py::array_t<float>(shape, tensor.as<const float>(), self);
  }
  return arrays;
}

py::dict parameter_shapes(const LanguageModel& model) {
  py::dict shapes;
  for (const auto& [name, tensor] : model.parameters())
    shapes[py::str(name)] =
        py::tuple(py::cast(std::vector<int64_t>(tensor.shape, tensor.shape + tensor.rank)));
  return shapes;
}

void refresh(LanguageModel& model) {
  const py::gil_scoped_release release;
  const std::unique_lock<std::shared_mutex> lock(calls());
  model.refresh();
}

float loss_and_gradients(const LanguageModel& model, py::handle token_ids, py::handle targets,
                         py::handle cu_seqlens, const py::dict& gradients, bool accumulate,
                         int64_t num_targets, bool recompute_layers) {
  const std::string op = "loss_and_gradients: ";
  std::vector<Borrowed> borrowed;
  const auto array = [&](py::handle object, const std::string& name) {
    if (object.is_none()) return TensorView();
    borrowed.push_back(borrow(object, op + name));
    return borrowed.back().view;
  };
  float loss = 0;
  LanguageModelTrainArgs args;
  args.token_ids = array(token_ids, "token_ids");
  args.targets = array(targets, "targets");
  args.cu_seqlens = array(cu_seqlens, "cu_seqlens");
  args.num_targets = num_targets;
  args.recompute_layers = recompute_layers;
  args.loss = TensorView(&loss, DType::float32, {1});
  for (const auto& [key, gradient] : gradients) {
    const auto name = key.cast<std::string>();
    args.gradients[name] = {array(gradient, "the gradient of " + name), accumulate};
    if (borrowed.back().read_only)
      throw Error(ErrorCode::invalid_argument,
                  op + "the gradient of " + name + " is read-only, but would be written");
  }
  const Context& context = cpu_context();
  const py::gil_scoped_release release;
  const std::shared_lock<std::shared_mutex> lock(calls());
  const Buffer workspace(context.allocator(),
                         model.loss_and_gradients_workspace_size(args, context),
                         "the activations of a training step");
  model.loss_and_gradients(args, Exec{context, nullptr, workspace.data(), workspace.bytes()});
  return loss;
}

void save_model(const LanguageModel& model, const std::string& folder) {
  save_checkpoint(model.checkpoint(), folder);
}

const char* format_name(const ModelConfig& config) {
  return config.format == CheckpointFormat::upstream ? "upstream" : "transformers";
}

}  // namespace

void bind_model(py::module_& module) {
  py::class_<ModelConfig>(module, "ModelConfig")
      .def_property_readonly("format", &format_name)
      .def_readonly("model_type", &ModelConfig::model_type)
      .def_readonly("d_model", &ModelConfig::d_model)
      .def_readonly("vocab_size", &ModelConfig::vocab_size)
      .def_readonly("padded_vocab_size", &ModelConfig::padded_vocab_size)
      .def_property_readonly("n_layer", [](const ModelConfig& c) { return c.layers.size(); })
      .def_readonly("dim", &ModelConfig::dim)
      .def_readonly("dstate", &ModelConfig::dstate)
      .def_readonly("width", &ModelConfig::width)
      .def_readonly("dt_rank", &ModelConfig::dt_rank)
      .def_readonly("norm_eps", &ModelConfig::norm_eps)
      .def_readonly("mixer_norm_eps", &ModelConfig::mixer_norm_eps)
      .def_readonly("use_bias", &ModelConfig::use_bias)
      .def_readonly("use_conv_bias", &ModelConfig::use_conv_bias)
      .def_readonly("tie_embeddings", &ModelConfig::tie_embeddings)
      .def_readonly("eos_token_ids", &ModelConfig::eos_token_ids);

  module.def("open_model_config", &open_model_config, py::arg("folder"));
  module.def("open_shard_index", &open_shard_index, py::arg("path"));

  py::class_<Checkpoint>(module, "Checkpoint")
      .def_static("open", &open_checkpoint, py::arg("folder"),
                  py::call_guard<py::gil_scoped_release>())
      .def_static("from_tensors", &checkpoint_from_tensors, py::arg("config"), py::arg("tensors"))
      .def_readonly("config", &Checkpoint::config)
      .def("tensors", &describe_tensors);

  py::class_<ModelState>(module, "ModelState")
      .def_property_readonly("num_slots", &ModelState::num_slots)
      .def_property_readonly("nbytes", &ModelState::nbytes)
      .def("clone", &ModelState::clone)
      .def("is_at_start", &ModelState::is_at_start, py::arg("slot"))
      .def("reset_slot", &ModelState::reset_slot, py::arg("slot"))
      .def("copy_slot", &ModelState::copy_slot, py::arg("src"), py::arg("dst"))
      .def("save", [](const ModelState& state) { return py::bytes(state.save()); })
      .def("load", &ModelState::load, py::arg("bytes"));

  py::class_<LanguageModel>(module, "LanguageModel")
      .def(py::init(&make_model), py::arg("checkpoint"), py::arg("dtype") = "float32",
           py::arg("trainable") = false)
      .def_property_readonly("config", &LanguageModel::config)
      .def_property_readonly("dtype", [](const LanguageModel& m) { return dtype_name(m.dtype()); })
      .def_property_readonly("num_parameters", &LanguageModel::num_parameters)
      .def_property_readonly("trainable", &LanguageModel::trainable)
      .def("parameters", &parameters)
      .def("parameter_shapes", &parameter_shapes)
      .def("refresh", &refresh)
      .def("loss_and_gradients", &loss_and_gradients, py::arg("token_ids"), py::arg("targets"),
           py::arg("cu_seqlens"), py::arg("gradients"), py::arg("accumulate"),
           py::arg("num_targets"), py::arg("recompute_layers"))
      .def("new_state", &LanguageModel::new_state, py::arg("num_slots") = 1)
      .def("forward", &forward, py::arg("token_ids"), py::arg("logits"), py::arg("state"),
           py::arg("state_indices") = py::none(), py::arg("cu_seqlens") = py::none())
      .def("save", &save_model, py::arg("folder"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace ssmcore
