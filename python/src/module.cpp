// The native module, ssmcore._core.
#include <pybind11/pybind11.h>

#include <mutex>

#include "call.h"
#include "ssmcore/context.h"
#include "ssmcore/error.h"

namespace py = pybind11;

namespace ssmcore {

std::shared_mutex& calls() {
  static std::shared_mutex& mutex = *new std::shared_mutex;
  return mutex;
}

namespace {

// The class of ssmcore.errors for each code.
const char* error_class(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
    case ErrorCode::not_found:
    case ErrorCode::invalid_checkpoint:
      return "InvalidArgumentError";
    case ErrorCode::not_finite:
      return "NotFiniteError";
    default:
      return "BackendError";
  }
}

void translate_error(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& error) {
    const py::object type = py::module_::import("ssmcore.errors").attr(error_class(error.code()));
    PyErr_SetString(type.ptr(), error.what());
  }
}

}  // namespace
}  // namespace ssmcore

PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
  using namespace ssmcore;
  py::register_local_exception_translator(translate_error);
  module.attr("__version__") = SSMCORE_VERSION;
  module.def("isa", [] { return isa_name(cpu_context().isa()); });
  module.def("num_threads", [] { return cpu_context().num_threads(); });
  module.def(
      "set_num_threads",
      [](int n) {
        const std::unique_lock<std::shared_mutex> lock(calls());
        cpu_context().set_num_threads(n);
      },
      py::arg("n"), py::call_guard<py::gil_scoped_release>());
  bind_arrays(module);
  bind_ops(module);
  bind_model(module);
  bind_trainer(module);
  bind_xla(module);
}
