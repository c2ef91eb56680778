// Tensors as kernels see them.
#pragma once

#include <cstdint>

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

}  // namespace ssmcore
