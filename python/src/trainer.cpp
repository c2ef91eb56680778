// Training.
#include "ssmcore/trainer.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "call.h"

namespace py = pybind11;

namespace ssmcore {
namespace {

std::unique_ptr<Trainer> make_trainer(LanguageModel& model, const py::kwargs& settings) {
  TrainerOptions options;
  const auto read = [&](const char* name, auto& value) {
    try {
      value = settings[name].cast<std::remove_reference_t<decltype(value)>>();
    } catch (const py::cast_error&) {
      throw Error(ErrorCode::invalid_argument, std::string("trainer: ") + name + " is " +
                                                   std::string(py::repr(settings[name])) +
                                                   ", out of range or no number");
    }
  };
  read("lr", options.lr);
  read("warmup_steps", options.warmup_steps);
  read("total_steps", options.total_steps);
  read("final_lr", options.final_lr);
  read("beta1", options.beta1);
  read("beta2", options.beta2);
  read("eps", options.eps);
  read("weight_decay", options.weight_decay);
  read("max_grad_norm", options.max_grad_norm);
  read("micro_batch", options.micro_batch);
  read("recompute_layers", options.recompute_layers);
  const py::gil_scoped_release release;
  return std::make_unique<Trainer>(model, options, own_stream(model.context().device()));
}

// Nothing else runs meanwhile: the weights change.
TrainerStep step(Trainer& trainer, py::handle token_ids, py::handle targets) {
  const Borrowed ids = borrow(token_ids, "trainer: token_ids"),
                 next = borrow(targets, "trainer: targets");
  const py::gil_scoped_release release;
  const std::unique_lock<std::shared_mutex> lock(calls());
  return trainer.step(ids.view, next.view);
}

void load(Trainer& trainer, const std::string& path) {
  const std::unique_lock<std::shared_mutex> lock(calls());
  trainer.load(path);
}

}  // namespace

void bind_trainer(py::module_& module) {
  py::class_<TrainerStep>(module, "TrainerStep")
      .def_readonly("step", &TrainerStep::step)
      .def_readonly("loss", &TrainerStep::loss)
      .def_readonly("grad_norm", &TrainerStep::grad_norm)
      .def_readonly("lr", &TrainerStep::lr);
  py::class_<Trainer>(module, "Trainer")
      .def(py::init(&make_trainer), py::arg("language_model"), py::keep_alive<1, 2>())
      .def_property_readonly("steps_taken", &Trainer::steps_taken)
      .def("lr", &Trainer::lr, py::arg("step"))
      .def("step", &step, py::arg("token_ids"), py::arg("targets"))
      .def("save", &Trainer::save, py::arg("path"), py::call_guard<py::gil_scoped_release>())
      .def("load", &load, py::arg("path"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace ssmcore
