// Tensors as kernels see them.
#pragma once

#include <cstdint>

#include "ssmcore/gradient.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// A checked view reduced to pointer and strides (in elements); data is null where it is absent.
template <int Rank>
struct Strided {
  void* data = nullptr;
  int64_t stride[Rank] = {};

  Strided() = default;
  explicit Strided(const TensorView& view) : data(view.data) {
    for (int i = 0; i < Rank; ++i) stride[i] = view.strides[i];
  }
  explicit operator bool() const { return data != nullptr; }
};

// The same for a gradient.
template <int Rank>
struct StridedGradient : Strided<Rank> {
  DType dtype = DType::float32;
  bool accumulate = false;

  StridedGradient() = default;
  explicit StridedGradient(const Gradient& gradient)
      : Strided<Rank>(gradient.tensor),
        dtype(gradient.tensor.dtype),
        accumulate(gradient.accumulate) {}
};

// ⌈n / d⌉ for n ≥ 0 and d > 0, whatever their size.
__attribute__((always_inline)) inline int64_t ceil_div(int64_t n, int64_t d) {
  return n / d + (n % d != 0);
}

// Element `at` of int32 or int64 data.
__attribute__((always_inline)) inline int64_t integer_at(const void* data, DType dtype,
                                                         int64_t at) {
  return dtype == DType::int32 ? static_cast<const int32_t*>(data)[at]
                               : static_cast<const int64_t*>(data)[at];
}

}  // namespace ssmcore
