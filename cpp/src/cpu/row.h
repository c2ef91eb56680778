// Rows of an operand as floats.
#pragma once

#include <type_traits>

#include "../strided.h"
#include "vec.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

// n elements, `stride` apart, into floats.
inline void load_row(const void* from, DType dtype, int64_t stride, int64_t n, float* row) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* at = static_cast<const T*>(from);
    int64_t i = 0;
    if (stride == 1)
      for (; i + kLanes <= n; i += kLanes) store(row + i, load(at + i));
    for (; i < n; ++i) row[i] = to_float(at[i * stride]);
  });
}

// The row where it lies if it is of floats in whole vectors, else as floats in `memory`.
inline const float* float_row(const void* from, DType dtype, int64_t stride, int64_t n,
                              float* memory) {
  if (dtype == DType::float32 && stride == 1 && n % kLanes == 0)
    return static_cast<const float*>(from);
  load_row(from, dtype, stride, n, memory);
  return memory;
}

inline void store_row(const float* row, int64_t n, void* to, DType dtype, int64_t stride) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* at = static_cast<T*>(to);
    int64_t i = 0;
    if (stride == 1)
      for (; i + kLanes <= n; i += kLanes) store(at + i, load(row + i));
    for (; i < n; ++i) from_float(row[i], at + i * stride);
  });
}

// What a row of a gradient becomes: `row`, or what is there and `row`.
inline void store_gradient_row(const float* row, int64_t n, void* to, DType dtype, int64_t stride,
                               bool accumulate) {
  if (!accumulate) return store_row(row, n, to, dtype, stride);
  constexpr int64_t kBlock = 64;
  const int64_t step = stride * static_cast<int64_t>(dtype_size(dtype));
  char* at = static_cast<char*>(to);
  float sum[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = min(kBlock, n - begin);
    load_row(at + begin * step, dtype, stride, count, sum);
    for (int64_t i = 0; i < count; ++i) sum[i] += row[begin + i];
    store_row(sum, count, at + begin * step, dtype, stride);
  }
}

// The address of row `index` of a (rows, n) operand.
inline char* row_of(const Strided<2>& tensor, DType dtype, int64_t index) {
  return static_cast<char*>(tensor.data) +
         index * tensor.stride[0] * static_cast<int64_t>(dtype_size(dtype));
}

// Row `index` of a gradient of (rows, n) that may not be wanted.
inline void store_gradient_row(const float* row, int64_t n, const StridedGradient<2>& gradient,
                               int64_t index) {
  if (gradient)
    store_gradient_row(row, n, row_of(gradient, gradient.dtype, index), gradient.dtype,
                       gradient.stride[1], gradient.accumulate);
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
