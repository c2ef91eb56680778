// Checkpoints and language models.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "call.h"
#include "ssmcore/checkpoint.h"
#include "ssmcore/decoder.h"
#include "ssmcore/initial_checkpoint.h"
#include "ssmcore/language_model.h"
#include "ssmcore/stream.h"

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

// `progress(done, total)` may be None; what it raises ends the loading.
std::unique_ptr<LanguageModel> make_model(const Checkpoint& checkpoint,
                                          const std::optional<std::string>& dtype, bool trainable,
                                          const std::string& device, bool batch_invariant,
                                          const py::object& progress) {
  LoadOptions options;
  if (dtype) options.dtype = parse_dtype(*dtype);
  options.trainable = trainable;
  if (!progress.is_none())
    options.progress = [&progress](size_t done, size_t total) {
      const py::gil_scoped_acquire acquire;
      progress(done, total);
    };
  const Device where = parse_device(device);
  const py::gil_scoped_release release;
  return std::make_unique<LanguageModel>(checkpoint, context_of(where, batch_invariant), options);
}

// All calls on a model of a GPU are in the order of one stream, that of arrays of no library.
void* stream_of(const Context& context) {
  return own_stream(context.device());
}

// `stream` is that of arrays in memory of the GPU, None where there are none.
void forward(const LanguageModel& model, py::handle token_ids, py::handle logits, ModelState& state,
             py::handle state_indices, py::handle cu_seqlens, py::handle stream) {
  const Context& context = model.context();
  void* const own = stream_of(context);
  const auto array = [&](py::handle object, const char* name) {
    return object.is_none() ? Borrowed()
                            : borrow(object, std::string("language_model: ") + name, own);
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
  LanguageModelFwdArgs args{ids.view, packed.view, &state, indices.view, out.view};
  void* const theirs = stream.is_none() ? own : reinterpret_cast<void*>(stream.cast<uintptr_t>());
  const py::gil_scoped_release release;
  const std::shared_lock<std::shared_mutex> lock(calls());
  wait_for(context, own, theirs);
  // Logits that the host wants come from the GPU as a whole.
  const bool via_device = out.view && out.view.device != context.device();
  const size_t logits_bytes = static_cast<size_t>(out.view.numel()) * sizeof(float);
  const Buffer device_logits(context.allocator(), via_device ? logits_bytes : 0, "logits", own);
  if (via_device) {
    args.logits.data = device_logits.data();
    args.logits.device = context.device();
  }
  // Sizes of 0 are left to forward() to refuse.
  const bool empty = ids.view.numel() == 0;
  const Buffer workspace(
      context.allocator(),
      empty ? 0 : model.workspace_size(ids.view.shape[0], ids.view.shape[1], context),
      "a model's activations", own);
  const Exec exec{context, own, workspace.data(), workspace.bytes()};
  model.forward(args, exec);
  if (via_device) copy(args.logits, out.view, exec);
  wait_for(context, theirs, own);
}

using Ints = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

// Prompts one after another, with what is one number for each of them.
void admit(Decoder& decoder, const std::vector<int32_t>& slots, const Ints& token_ids,
           const Ints& lengths, const Floats& temperature, const Ints& top_k, const Floats& top_p,
           const Floats& min_p, const Floats& repetition_penalty, const Ints& seed) {
  std::vector<DecoderPrompt> prompts;
  const int64_t* ids = token_ids.data();
  for (py::ssize_t i = 0; i < static_cast<py::ssize_t>(slots.size()); ++i) {
    DecoderPrompt prompt;
    prompt.slot = slots[static_cast<size_t>(i)];
    prompt.token_ids = ids;
    prompt.length = lengths.at(i);
    if (prompt.length < 0 || prompt.length > token_ids.data() + token_ids.size() - ids)
      throw Error(ErrorCode::invalid_argument, "decoder: more lengths than token_ids");
    ids += prompt.length;
    prompt.settings = {temperature.at(i), static_cast<int32_t>(top_k.at(i)), top_p.at(i),
                       min_p.at(i),       repetition_penalty.at(i),          seed.at(i)};
    prompts.push_back(prompt);
  }
  const py::gil_scoped_release release;
  const std::shared_lock<std::shared_mutex> lock(calls());
  decoder.admit(prompts);
}

template <void (Decoder::*kCall)(const std::vector<int32_t>&)>
void call_with_slots(Decoder& decoder, const std::vector<int32_t>& slots) {
  const py::gil_scoped_release release;
  const std::shared_lock<std::shared_mutex> lock(calls());
  (decoder.*kCall)(slots);
}

// The parameters of a trainable model, as arrays that keep it alive.
py::dict parameters(const py::object& self) {
  const auto& model = self.cast<const LanguageModel&>();
  if (!model.trainable())
    throw Error(ErrorCode::invalid_argument,
                "language_model: parameters of a model that is not trainable");
  py::dict arrays;
  for (const auto& [name, tensor] : model.parameters()) {
    if (tensor.device.type == DeviceType::cuda) {
      arrays[py::str(name)] = array_of(tensor, model.checkpoint().tensors.owner);
      continue;
    }
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

// `stream` is that of whoever has written the parameters, None where that is the host.
void refresh(LanguageModel& model, py::handle stream) {
  const Context& context = model.context();
  void* const own = stream_of(context);
  void* const theirs = stream.is_none() ? own : reinterpret_cast<void*>(stream.cast<uintptr_t>());
  const py::gil_scoped_release release;
  const std::unique_lock<std::shared_mutex> lock(calls());
  wait_for(context, own, theirs);
  model.refresh(own);
}

float loss_and_gradients(const LanguageModel& model, py::handle token_ids, py::handle targets,
                         py::handle cu_seqlens, const py::dict& gradients, bool accumulate,
                         int64_t num_targets, bool recompute_layers) {
  const std::string op = "loss_and_gradients: ";
  const Context& context = model.context();
  void* const stream = stream_of(context);
  std::vector<Borrowed> borrowed;
  const auto array = [&](py::handle object, const std::string& name) {
    if (object.is_none()) return TensorView();
    borrowed.push_back(borrow(object, op + name, stream));
    return borrowed.back().view;
  };
  LanguageModelTrainArgs args;
  args.token_ids = array(token_ids, "token_ids");
  args.targets = array(targets, "targets");
  args.cu_seqlens = array(cu_seqlens, "cu_seqlens");
  args.num_targets = num_targets;
  args.recompute_layers = recompute_layers;
  for (const auto& [key, gradient] : gradients) {
    const auto name = key.cast<std::string>();
    args.gradients[name] = {array(gradient, "the gradient of " + name), accumulate};
    if (!gradient.is_none() && borrowed.back().read_only)
      throw Error(ErrorCode::invalid_argument,
                  op + "the gradient of " + name + " is read-only, but would be written");
  }
  const py::gil_scoped_release release;
  const std::shared_lock<std::shared_mutex> lock(calls());
  const Buffer loss(context.allocator(), sizeof(float), "the loss", stream);
  args.loss = loss.view(DType::float32, {1});
  const Buffer workspace(context.allocator(),
                         model.loss_and_gradients_workspace_size(args, context),
                         "the activations of a training step", stream);
  const Exec exec{context, stream, workspace.data(), workspace.bytes()};
  try {
    model.loss_and_gradients(args, exec);
  } catch (const Error&) {
    // What the kernels under way still have to report is of this call too.
    try {
      context.synchronize(stream);
    } catch (const Error&) {
    }
    throw;
  }
  // Gradients of other libraries are whole once this has waited.
  float value = 0;
  copy(args.loss, TensorView(&value, DType::float32, {1}), exec);
  return value;
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
  module.def("parse_model_config", &parse_model_config, py::arg("json"));
  module.def("open_shard_index", &open_shard_index, py::arg("path"));

  py::class_<Checkpoint>(module, "Checkpoint")
      .def_static("open", &open_checkpoint, py::arg("folder"),
                  py::call_guard<py::gil_scoped_release>())
      .def_static("from_tensors", &checkpoint_from_tensors, py::arg("config"), py::arg("tensors"))
      .def_static("initial", &initial_checkpoint, py::arg("config"), py::arg("seed"),
                  py::call_guard<py::gil_scoped_release>())
      .def_readonly("config", &Checkpoint::config)
      .def("tensors", &describe_tensors);

  py::class_<ModelState>(module, "ModelState")
      .def_property_readonly("num_slots", &ModelState::num_slots)
      .def_property_readonly("nbytes", &ModelState::nbytes)
      .def_property_readonly(
          "device", [](const ModelState& state) { return to_string(state.context().device()); })
      .def("clone", [](const ModelState& state) { return state.clone(stream_of(state.context())); })
      .def(
          "is_at_start",
          [](const ModelState& state, int64_t slot) {
            return state.is_at_start(slot, stream_of(state.context()));
          },
          py::arg("slot"))
      .def(
          "reset_slot",
          [](ModelState& state, int64_t slot) {
            state.reset_slot(slot, stream_of(state.context()));
          },
          py::arg("slot"))
      .def(
          "copy_slot",
          [](ModelState& state, int64_t src, int64_t dst) {
            state.copy_slot(src, dst, stream_of(state.context()));
          },
          py::arg("src"), py::arg("dst"))
      .def(
          "save",
          [](const ModelState& state) { return py::bytes(state.save(stream_of(state.context()))); })
      .def(
          "load",
          [](ModelState& state, const std::string& bytes) {
            state.load(bytes, stream_of(state.context()));
          },
          py::arg("bytes"));

  py::class_<LanguageModel>(module, "LanguageModel")
      .def(py::init(&make_model), py::arg("checkpoint"), py::arg("dtype") = py::none(),
           py::arg("trainable") = false, py::arg("device") = "cpu",
           py::arg("batch_invariant") = false, py::arg("progress") = py::none())
      .def_property_readonly("config", &LanguageModel::config)
      .def_property_readonly("dtype", [](const LanguageModel& m) { return dtype_name(m.dtype()); })
      .def_property_readonly("device",
                             [](const LanguageModel& m) { return to_string(m.context().device()); })
      .def_property_readonly("num_parameters", &LanguageModel::num_parameters)
      .def_property_readonly("trainable", &LanguageModel::trainable)
      .def("parameters", &parameters)
      .def("parameter_shapes", &parameter_shapes)
      .def("refresh", &refresh, py::arg("stream") = py::none())
      .def("loss_and_gradients", &loss_and_gradients, py::arg("token_ids"), py::arg("targets"),
           py::arg("cu_seqlens"), py::arg("gradients"), py::arg("accumulate"),
           py::arg("num_targets"), py::arg("recompute_layers"))
      .def(
          "new_state",
          [](const LanguageModel& model, int64_t num_slots) {
            return model.new_state(num_slots, stream_of(model.context()));
          },
          py::arg("num_slots") = 1)
      .def("forward", &forward, py::arg("token_ids"), py::arg("logits"), py::arg("state"),
           py::arg("state_indices") = py::none(), py::arg("cu_seqlens") = py::none(),
           py::arg("stream") = py::none())
      .def(
          "new_decoder",
          [](const LanguageModel& model, ModelState& state, bool use_graphs) {
            DecoderOptions options;
            options.without_graphs = !use_graphs;
            return std::make_unique<Decoder>(model, state, stream_of(model.context()), options);
          },
          py::arg("state"), py::arg("use_graphs") = true, py::keep_alive<0, 1>(),
          py::keep_alive<0, 2>())
      .def("save", &LanguageModel::save, py::arg("folder"),
           py::call_guard<py::gil_scoped_release>());

  py::class_<Decoder>(module, "Decoder")
      .def_property_readonly("runs_ahead", &Decoder::runs_ahead)
      .def("admit", &admit, py::arg("slots"), py::arg("token_ids"), py::arg("lengths"),
           py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
           py::arg("repetition_penalty"), py::arg("seed"))
      .def("step", &call_with_slots<&Decoder::step>, py::arg("slots"))
      .def("read", &call_with_slots<&Decoder::read>, py::arg("slots"))
      .def("take", &Decoder::take, py::call_guard<py::gil_scoped_release>());
}

}  // namespace ssmcore
