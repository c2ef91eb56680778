#include "borrow.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstddef>
#include <optional>

#include "dlpack.h"
#include "ssmcore/error.h"

namespace py = pybind11;

namespace ssmcore {
namespace {

[[noreturn]] void fail(const std::string& what, const std::string& problem) {
  throw Error(ErrorCode::invalid_argument, what + " " + problem);
}

std::string type_name(py::handle object) {
  return py::str(py::type::of(object).attr("__name__"));
}

void check_rank(const std::string& what, int64_t rank) {
  if (rank < 1 || rank > kMaxRank)
    fail(what,
         "has " + std::to_string(rank) + " dimensions, expected 1 to " + std::to_string(kMaxRank));
}

std::optional<DType> numpy_dtype(const py::dtype& dtype) {
  if (dtype.byteorder() == '>') return std::nullopt;
  const char kind = dtype.kind();
  const auto size = dtype.itemsize();
  if (kind == 'f' && size == 4) return DType::float32;
  if (kind == 'f' && size == 8) return DType::float64;
  if (kind == 'f' && size == 2) return DType::float16;
  if (kind == 'i' && size == 4) return DType::int32;
  if (kind == 'i' && size == 8) return DType::int64;
  if (kind == 'c' && size == 8) return DType::complex64;
  if (size == 2 && py::str(dtype.attr("name")).equal(py::str("bfloat16"))) return DType::bfloat16;
  return std::nullopt;
}

Borrowed borrow_numpy(const py::array& array, const std::string& what) {
  const std::optional<DType> dtype = numpy_dtype(array.dtype());
  if (!dtype) fail(what, "has dtype " + std::string(py::str(array.dtype())));
  check_rank(what, array.ndim());
  Borrowed borrowed;
  borrowed.owner = array;
  borrowed.read_only = !array.writeable();
  borrowed.view.data = const_cast<void*>(array.data());
  borrowed.view.dtype = *dtype;
  borrowed.view.rank = static_cast<int>(array.ndim());
  const py::ssize_t item = array.itemsize();
  for (int i = 0; i < borrowed.view.rank; ++i) {
    borrowed.view.shape[i] = array.shape(i);
    if (array.strides(i) % item != 0) fail(what, "has strides that are not whole elements");
    borrowed.view.strides[i] = array.strides(i) / item;
  }
  return borrowed;
}

std::optional<DType> dlpack_dtype(dlpack::DataType type) {
  if (type.lanes != 1) return std::nullopt;
  const auto is = [&](uint8_t code, uint8_t bits) {
    return type.code == code && type.bits == bits;
  };
  if (is(dlpack::kFloat, 32)) return DType::float32;
  if (is(dlpack::kFloat, 64)) return DType::float64;
  if (is(dlpack::kFloat, 16)) return DType::float16;
  if (is(dlpack::kBfloat, 16)) return DType::bfloat16;
  if (is(dlpack::kInt, 32)) return DType::int32;
  if (is(dlpack::kInt, 64)) return DType::int64;
  if (is(dlpack::kComplex, 64)) return DType::complex64;
  return std::nullopt;
}

std::string type_text(dlpack::DataType type) {
  const char* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  const std::string kind = type.code < std::size(kinds)
                               ? kinds[type.code]
                               : "type " + std::to_string(type.code) + " of ";
  return kind + std::to_string(type.bits) +
         (type.lanes == 1 ? "" : " in vectors of " + std::to_string(type.lanes));
}

void read_tensor(const dlpack::Tensor& tensor, const std::string& what, TensorView& view) {
  const std::optional<DType> dtype = dlpack_dtype(tensor.dtype);
  if (!dtype) fail(what, "has dtype " + type_text(tensor.dtype) + ", which ssmcore does not know");
  check_rank(what, tensor.ndim);
  const bool on_cpu = tensor.device.code == dlpack::kCpu || tensor.device.code == dlpack::kCudaHost;
  const bool on_cuda =
      tensor.device.code == dlpack::kCuda || tensor.device.code == dlpack::kCudaManaged;
  if (!on_cpu && !on_cuda)
    fail(what, "is on a device (DLPack code " + std::to_string(tensor.device.code) +
                   ") that ssmcore does not know");
  view.device = on_cpu ? Device{} : Device{DeviceType::cuda, tensor.device.index};
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.dtype = *dtype;
  view.rank = tensor.ndim;
  int64_t contiguous = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    view.shape[i] = tensor.shape[i];
    view.strides[i] = tensor.strides ? tensor.strides[i] : contiguous;
    contiguous *= tensor.shape[i];
  }
}

bool is_on_gpu(py::handle array) {
  if (!py::hasattr(array, "__dlpack_device__")) return false;
  const int code = py::int_(array.attr("__dlpack_device__")().attr("__getitem__")(0));
  return code == dlpack::kCuda || code == dlpack::kCudaManaged;
}

// The numbers of DLPack: 1 is the default stream, and -1 asks for no order at all.
py::dict stream_argument(py::handle array, void* stream) {
  py::dict argument;
  if (is_on_gpu(array))
    argument["stream"] = stream ? static_cast<int64_t>(reinterpret_cast<intptr_t>(stream)) : -1;
  return argument;
}

py::object dlpack_capsule(py::handle array, void* stream) {
  const py::object method = array.attr("__dlpack__");
  const py::dict argument = stream_argument(array, stream);
  try {
    return method(py::arg("max_version") = py::make_tuple(1, 0), **argument);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    return method(**argument);  // a producer from before DLPack 1.0
  }
}

// Whether the library of an array would record a gradient of it.
bool requires_gradient(py::handle array) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  PyObject* value = PyObject_GetAttr(array.ptr(), name);
  if (!value) PyErr_Clear();
  const bool requires = value == Py_True;
  Py_XDECREF(value);
  return requires;
}

// ssmcore records nothing for autograd. Where torch would, that must not go unnoticed; elsewhere a
// parameter is a tensor like any other.
void check_no_gradient(const std::string& what) {
  static const py::handle is_grad_enabled =
      py::object(py::module_::import("torch").attr("is_grad_enabled")).release();
  if (is_grad_enabled().cast<bool>())
    fail(what,
         "requires a gradient, which ssmcore.ops does not record: call it under "
         "torch.no_grad(), or detach the tensor");
}

// The interface that the type of an array has for C, if any.
const dlpack::ExchangeApi* exchange_api(py::handle array) {
  static PyObject* const name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  const py::handle type = py::type::handle_of(array);
  if (PyObject_HasAttr(type.ptr(), name) == 0) return nullptr;
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return api->major == 1 && api->tensor_from_object ? api : nullptr;
}

// Whether `stream` is where the library of the array works at present; its default is 0 or 1.
bool is_current(const dlpack::ExchangeApi& api, const dlpack::Tensor& tensor, void* stream) {
  if (tensor.device.code == dlpack::kCpu) return true;
  void* current = nullptr;
  if (!api.current_stream ||
      api.current_stream(tensor.device.code, tensor.device.index, &current) != 0) {
    PyErr_Clear();
    return false;
  }
  const auto number = [](void* handle) { return std::max<uintptr_t>(uintptr_t(handle), 1); };
  return number(current) == number(stream);
}

// Without calls of Python, which take microseconds. Needs no order beyond that of the stream.
std::optional<Borrowed> borrow_directly(py::handle array, const std::string& what, void* stream) {
  const dlpack::ExchangeApi* api = exchange_api(array);
  dlpack::Tensor tensor;
  if (!api) return std::nullopt;
  if (api->tensor_from_object(array.ptr(), &tensor) != 0) {
    PyErr_Clear();  // the other way says what is wrong
    return std::nullopt;
  }
  if (!is_current(*api, tensor, stream)) return std::nullopt;
  Borrowed borrowed;
  borrowed.owner = py::reinterpret_borrow<py::object>(array);
  read_tensor(tensor, what, borrowed.view);
  return borrowed;
}

// The capsule stays unconsumed and is the owner: dropping it lets the producer free its export.
Borrowed borrow_dlpack(py::handle array, const std::string& what, void* stream) {
  const bool is_parameter = requires_gradient(array);
  if (is_parameter) check_no_gradient(what);
  if (auto direct = borrow_directly(array, what, stream)) return *direct;
  Borrowed borrowed;
  const py::object tensor =
      is_parameter ? py::object(array.attr("detach")()) : py::reinterpret_borrow<py::object>(array);
  try {
    borrowed.owner = dlpack_capsule(tensor, stream);
  } catch (const py::error_already_set& error) {
    fail(what, "cannot be read through DLPack: " + std::string(py::str(error.value())));
  }
  PyObject* capsule = borrowed.owner.ptr();
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    const auto* managed = static_cast<const dlpack::ManagedTensorVersioned*>(
        PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    if (managed->major != 1)
      fail(what, "comes with DLPack version " + std::to_string(managed->major) + ", expected 1");
    read_tensor(managed->tensor, what, borrowed.view);
    borrowed.read_only = (managed->flags & dlpack::kReadOnly) != 0;
  } else if (PyCapsule_IsValid(capsule, "dltensor")) {
    const auto* managed =
        static_cast<const dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    read_tensor(managed->tensor, what, borrowed.view);
  } else {
    fail(what, "gave something that is no DLPack capsule");
  }
  return borrowed;
}

}  // namespace

TensorView without_memory(py::handle array, const std::string& what) {
  if (py::isinstance<py::array>(array))
    return borrow_numpy(py::reinterpret_borrow<py::array>(array), what).view;
  const py::object given = array.attr("dtype");
  const std::optional<DType> dtype = numpy_dtype(py::dtype::from_args(given));
  if (!dtype) fail(what, "has dtype " + std::string(py::str(given)));
  const py::tuple shape = array.attr("shape");
  check_rank(what, static_cast<int64_t>(shape.size()));
  TensorView view;
  view.data = reinterpret_cast<void*>(alignof(std::max_align_t));
  view.dtype = *dtype;
  view.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = shape[static_cast<size_t>(i)].cast<int64_t>();
    view.strides[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

Borrowed borrow(py::handle array, const std::string& what, void* stream) {
  if (py::isinstance<py::array>(array))
    return borrow_numpy(py::reinterpret_borrow<py::array>(array), what);
  if (py::hasattr(array, "__dlpack__")) return borrow_dlpack(array, what, stream);
  fail(what, "is a " + type_name(array) + ", expected an array");
}

}  // namespace ssmcore
