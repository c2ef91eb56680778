// TensorView: how every ssmcore function sees memory that somebody else owns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace ssmcore {

enum class DType : uint8_t { float32, float64, bfloat16, float16, int32, int64, complex64 };

size_t dtype_size(DType dtype);
const char* dtype_name(DType dtype);

enum class DeviceType : uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;

  friend bool operator==(Device a, Device b) { return a.type == b.type && a.index == b.index; }
  friend bool operator!=(Device a, Device b) { return !(a == b); }
};

std::string to_string(Device device);

inline constexpr int kMaxRank = 6;

// A non-owning strided tensor. Strides count elements and are never negative; 0 repeats an element
// (inputs only). A view of rank 0 is empty and means "absent": every optional argument defaults
// to it.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  Device device;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};

  TensorView() = default;
  // A row-major contiguous view.
  TensorView(void* data, DType dtype, std::initializer_list<int64_t> shape, Device device = {});
  TensorView(void* data, DType dtype, std::initializer_list<int64_t> shape,
             std::initializer_list<int64_t> strides, Device device = {});

  explicit operator bool() const { return rank > 0; }

  int64_t numel() const;
  size_t nbytes() const;  // of its elements, wherever they lie
  bool is_contiguous() const;
  std::string shape_string() const;  // "(2, 16, 128)"

  // Views into the same memory. The caller keeps `dim` and the ranges in bounds.
  TensorView select(int dim, int64_t index) const;                 // drops `dim`
  TensorView slice(int dim, int64_t begin, int64_t length) const;  // keeps `dim`
  TensorView transpose(int dim0, int dim1) const;
  TensorView unsqueeze(int dim) const;             // inserts a dimension of size 1
  TensorView split(int dim, int64_t outer) const;  // size n as two of sizes outer, n / outer

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace ssmcore
