// ssmcore.Array: memory on any device that belongs to no framework.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "call.h"
#include "dlpack.h"
#include "ssmcore/stream.h"

namespace py = pybind11;

namespace ssmcore {
namespace {

// The memory of an array, of its reshaped views, and of what has been exported of it: its own, or
// kept by another owner.
class Storage {
 public:
  Storage(Device device, size_t bytes)
      : context_(context_of(device)),
        stream_(own_stream(device)),
        buffer_(context_.allocator(), bytes, "an array", stream_) {}
  Storage(Device device, std::shared_ptr<const void> owner)
      : context_(context_of(device)), stream_(own_stream(device)), owner_(std::move(owner)) {}

  // The memory may be in use on streams of those it was given to: it is free after them.
  ~Storage() {
    try {
      for (void* stream : users_) wait_for(context_, stream_, stream);
    } catch (const Error&) {
      // The device has failed, and whoever uses it next learns of that.
    }
  }

  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  void* data() const { return buffer_.data(); }
  Context& context() const { return context_; }
  void* stream() const { return stream_; }
  Exec exec() const { return Exec{context_, stream_, nullptr, 0}; }

  void give_to(void* stream) {
    wait_for(context_, stream, stream_);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (std::find(users_.begin(), users_.end(), stream) == users_.end()) users_.push_back(stream);
  }

 private:
  Context& context_;
  void* stream_;
  Buffer buffer_;
  std::shared_ptr<const void> owner_;
  std::mutex mutex_;
  std::vector<void*> users_;
};

struct Array {
  std::shared_ptr<Storage> storage;
  TensorView view;
};

[[noreturn]] void fail(const std::string& message) {
  throw Error(ErrorCode::invalid_argument, message);
}

py::dtype to_numpy(DType dtype) {
  if (dtype == DType::bfloat16)
    return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
  return py::dtype(std::string(dtype_name(dtype)));
}

DType parse_dtype(const std::string& name) {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16, DType::int32,
                      DType::int64, DType::complex64})
    if (name == dtype_name(dtype)) return dtype;
  fail("array: dtype is '" + name + "', which ssmcore does not know");
}

TensorView contiguous(const std::vector<int64_t>& shape, DType dtype, Device device) {
  if (shape.empty() || shape.size() > static_cast<size_t>(kMaxRank))
    fail("array: shape has " + std::to_string(shape.size()) + " dimensions, expected 1 to " +
         std::to_string(kMaxRank));
  TensorView view;
  view.dtype = dtype;
  view.device = device;
  view.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    const int64_t size = shape[static_cast<size_t>(i)];
    if (size < 0) fail("array: shape has a negative size, " + std::to_string(size));
    view.shape[i] = size;
    view.strides[i] = stride;
    if (__builtin_mul_overflow(stride, std::max<int64_t>(size, 1), &stride) ||
        stride > INT64_MAX / 16)
      fail("array: shape is beyond any memory");
  }
  return view;
}

Array empty(const std::vector<int64_t>& shape, const std::string& dtype,
            const std::string& device) {
  Array array;
  array.view = contiguous(shape, parse_dtype(dtype), parse_device(device));
  const size_t bytes = array.view.nbytes();
  const py::gil_scoped_release release;
  array.storage = std::make_shared<Storage>(array.view.device, std::max<size_t>(bytes, 1));
  array.view.data = array.storage->data();
  return array;
}

py::tuple shape_of(const Array& array) {
  py::tuple shape(array.view.rank);
  for (int i = 0; i < array.view.rank; ++i) shape[i] = array.view.shape[i];
  return shape;
}

Array reshape(const Array& array, const py::args& sizes) {
  const bool is_one_sequence = sizes.size() == 1 && py::isinstance<py::sequence>(sizes[0]);
  const py::object given = is_one_sequence ? py::object(sizes[0]) : py::object(sizes);
  auto shape = given.cast<std::vector<int64_t>>();
  int64_t known = 1;
  for (const int64_t size : shape) known *= size == -1 ? 1 : size;
  for (int64_t& size : shape)
    if (size == -1 && known > 0) size = array.view.numel() / known;
  Array result{array.storage, contiguous(shape, array.view.dtype, array.view.device)};
  if (result.view.numel() != array.view.numel())
    fail("array: shape " + array.view.shape_string() + " cannot become " +
         result.view.shape_string());
  result.view.data = array.view.data;
  return result;
}

py::array as_numpy(const py::object& self) {
  const Array& array = self.cast<const Array&>();
  const TensorView& view = array.view;
  const std::vector<py::ssize_t> shape(view.shape, view.shape + view.rank);
  if (view.device == Device{}) return py::array(to_numpy(view.dtype), shape, view.data, self);
  py::array result(to_numpy(view.dtype), shape);
  TensorView target = view;
  target.device = {};
  target.data = result.mutable_data();
  const py::gil_scoped_release release;
  copy(view, target, array.storage->exec());  // which waits
  return result;
}

void copy_from(Array& array, const py::object& source) {
  // What NumPy has scattered it gathers.
  const py::object given = py::isinstance<py::array>(source)
                               ? py::module_::import("numpy").attr("ascontiguousarray")(source)
                               : source;
  const Borrowed borrowed = borrow(given, "copy_from: source", array.storage->stream());
  const py::gil_scoped_release release;
  copy(borrowed.view, array.view, array.storage->exec());
  array.storage->context().synchronize(array.storage->stream());
}

// What a capsule of either version holds: the exported tensor, and the memory it keeps.
template <typename Managed>
struct Export {
  std::shared_ptr<Storage> storage;
  int64_t shape[kMaxRank], strides[kMaxRank];
  Managed managed{};
};

dlpack::DataType dlpack_type(DType dtype) {
  const auto bits = static_cast<uint8_t>(8 * dtype_size(dtype));
  switch (dtype) {
    case DType::bfloat16:
      return {dlpack::kBfloat, bits, 1};
    case DType::int32:
    case DType::int64:
      return {dlpack::kInt, bits, 1};
    case DType::complex64:
      return {dlpack::kComplex, bits, 1};
    default:
      return {dlpack::kFloat, bits, 1};
  }
}

dlpack::Device dlpack_device(Device device) {
  return {device.type == DeviceType::cuda ? dlpack::kCuda : dlpack::kCpu, device.index};
}

template <typename Managed>
py::capsule export_capsule(const Array& array, const char* name) {
  auto* exported = new Export<Managed>{array.storage, {}, {}, {}};
  const TensorView& view = array.view;
  std::copy_n(view.shape, view.rank, exported->shape);
  std::copy_n(view.strides, view.rank, exported->strides);
  Managed& managed = exported->managed;
  managed.tensor = {view.data,       dlpack_device(view.device), view.rank, dlpack_type(view.dtype),
                    exported->shape, exported->strides,          0};
  if constexpr (std::is_same_v<Managed, dlpack::ManagedTensorVersioned>) managed.major = 1;
  managed.manager = exported;
  managed.deleter = [](Managed* self) { delete static_cast<Export<Managed>*>(self->manager); };
  return py::capsule(&managed, name, [](PyObject* capsule) {
    // Renamed by whoever took it over.
    for (const char* unused : {"dltensor", "dltensor_versioned"})
      if (PyCapsule_IsValid(capsule, unused)) {
        auto* tensor = static_cast<Managed*>(PyCapsule_GetPointer(capsule, unused));
        tensor->deleter(tensor);
      }
  });
}

py::capsule to_dlpack(const Array& array, const py::object& stream, const py::object& max_version,
                      const py::object& dl_device, const py::object& copy) {
  const auto device = dlpack_device(array.view.device);
  if (!copy.is_none() && copy.cast<bool>())
    throw py::buffer_error("ssmcore.Array: __dlpack__ makes no copies");
  if (!dl_device.is_none()) {
    const auto wanted = dl_device.cast<std::pair<int, int>>();
    if (wanted.first != device.code || wanted.second != device.index)
      throw py::buffer_error("ssmcore.Array: __dlpack__ does not move arrays between devices");
  }
  if (array.view.device.type == DeviceType::cuda) {
    // 1 and 2 are CUDA's own handles for its default streams, 0 would be either of them.
    const auto number = stream.is_none() ? int64_t{1} : stream.cast<int64_t>();
    if (number == 0 || number < -1)
      throw py::buffer_error("ssmcore.Array: __dlpack__ takes no stream " + std::to_string(number));
    if (number != -1) array.storage->give_to(reinterpret_cast<void*>(number));
  } else if (!stream.is_none() && stream.cast<int64_t>() != -1) {
    throw py::buffer_error("ssmcore.Array: an array on the CPU has no streams");
  }
  if (!max_version.is_none() && max_version.cast<std::pair<int, int>>().first >= 1)
    return export_capsule<dlpack::ManagedTensorVersioned>(array, "dltensor_versioned");
  return export_capsule<dlpack::ManagedTensor>(array, "dltensor");
}

}  // namespace

py::object array_of(const TensorView& view, std::shared_ptr<const void> owner) {
  return py::cast(Array{std::make_shared<Storage>(view.device, std::move(owner)), view});
}

void bind_arrays(py::module_& module) {
  py::class_<Array>(module, "Array")
      .def_property_readonly("shape", &shape_of)
      .def_property_readonly("ndim", [](const Array& array) { return array.view.rank; })
      .def_property_readonly("size", [](const Array& array) { return array.view.numel(); })
      .def_property_readonly("dtype", [](const Array& array) { return to_numpy(array.view.dtype); })
      .def_property_readonly("nbytes", [](const Array& array) { return array.view.nbytes(); })
      .def_property_readonly("device",
                             [](const Array& array) { return to_string(array.view.device); })
      .def("reshape", &reshape)
      .def("numpy", &as_numpy)
      .def("copy_from", &copy_from, py::arg("source"))
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(),
           py::arg("copy") = py::none())
      .def("__dlpack_device__",
           [](const Array& array) {
             const auto device = dlpack_device(array.view.device);
             return std::pair<int, int>(device.code, device.index);
           })
      .def("__repr__", [](const Array& array) {
        return "<ssmcore.Array " + array.view.shape_string() + " " + dtype_name(array.view.dtype) +
               " on " + to_string(array.view.device) + ">";
      });
  module.def("empty", &empty, py::arg("shape"), py::arg("dtype"), py::arg("device"));
  module.def("cuda_device_count", &cuda_device_count);
  module.def(
      "device_memory",
      [](const std::string& device) {
        const DeviceMemory memory = device_memory(context_of(parse_device(device)));
        return py::make_tuple(memory.free, memory.total);
      },
      py::arg("device"));
  module.def("set_cublaslt_path", &set_cublaslt_path, py::arg("path"));
  module.def(
      "own_stream",
      [](int index) { return reinterpret_cast<uintptr_t>(own_stream({DeviceType::cuda, index})); },
      py::arg("index"));
  module.def(
      "synchronize",
      [](int index, uintptr_t stream) {
        const py::gil_scoped_release release;
        context_of({DeviceType::cuda, index}).synchronize(reinterpret_cast<void*>(stream));
      },
      py::arg("index"), py::arg("stream"));
}

}  // namespace ssmcore
