#include "ssmcore/tensor.h"

#include <algorithm>

namespace ssmcore {

size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
    case DType::float16:
      return 2;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::float64:
    case DType::int64:
    case DType::complex64:
      return 8;
  }
  return 0;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
    case DType::complex64:
      return "complex64";
  }
  return "unknown";
}

std::string to_string(Device device) {
  return device.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

TensorView::TensorView(void* data, DType dtype, std::initializer_list<int64_t> shape, Device device)
    : data(data), dtype(dtype), device(device), rank(static_cast<int>(shape.size())) {
  std::copy(shape.begin(), shape.end(), this->shape);
  int64_t stride = 1;
  for (int i = rank - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= this->shape[i];
  }
}

TensorView::TensorView(void* data, DType dtype, std::initializer_list<int64_t> shape,
                       std::initializer_list<int64_t> strides, Device device)
    : data(data), dtype(dtype), device(device), rank(static_cast<int>(shape.size())) {
  std::copy(shape.begin(), shape.end(), this->shape);
  std::copy(strides.begin(), strides.end(), this->strides);
}

int64_t TensorView::numel() const {
  int64_t n = rank > 0 ? 1 : 0;
  for (int i = 0; i < rank; ++i) n *= shape[i];
  return n;
}

size_t TensorView::nbytes() const {
  return static_cast<size_t>(numel()) * dtype_size(dtype);
}

bool TensorView::is_contiguous() const {
  int64_t stride = 1;
  for (int i = rank - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != stride) return false;
    stride *= shape[i];
  }
  return true;
}

std::string TensorView::shape_string() const {
  std::string text = "(";
  for (int i = 0; i < rank; ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + (rank == 1 ? ",)" : ")");
}

TensorView TensorView::select(int dim, int64_t index) const {
  TensorView view = slice(dim, index, 1);
  --view.rank;
  for (int i = dim; i < view.rank; ++i) {
    view.shape[i] = shape[i + 1];
    view.strides[i] = strides[i + 1];
  }
  return view;
}

TensorView TensorView::slice(int dim, int64_t begin, int64_t length) const {
  TensorView view = *this;
  view.data = static_cast<char*>(data) + begin * strides[dim] * dtype_size(dtype);
  view.shape[dim] = length;
  return view;
}

TensorView TensorView::transpose(int dim0, int dim1) const {
  TensorView view = *this;
  std::swap(view.shape[dim0], view.shape[dim1]);
  std::swap(view.strides[dim0], view.strides[dim1]);
  return view;
}

TensorView TensorView::unsqueeze(int dim) const {
  TensorView view = *this;
  for (int i = rank; i > dim; --i) {
    view.shape[i] = shape[i - 1];
    view.strides[i] = strides[i - 1];
  }
  view.shape[dim] = 1;
  view.strides[dim] = 0;
  ++view.rank;
  return view;
}

TensorView TensorView::split(int dim, int64_t outer) const {
  TensorView view = unsqueeze(dim);
  view.shape[dim] = outer;
  view.shape[dim + 1] = shape[dim] / outer;
  view.strides[dim] = view.shape[dim + 1] * strides[dim];
  return view;
}

}  // namespace ssmcore
