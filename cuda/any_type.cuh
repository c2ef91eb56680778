// Elements of a type that is chosen while a kernel runs: where memory is what it waits for, that
// costs nothing, and one kernel serves every combination of types.
#pragma once

#include "device/words.cuh"
#include "ssmcore/tensor.h"

namespace ssmcore::cuda {

// Calls `function` with a null pointer to the type.
template <typename Function>
__device__ __forceinline__ void with_device_type(DType dtype, const Function& function) {
  if (dtype == DType::bfloat16)
    function(static_cast<bfloat16*>(nullptr));
  else if (dtype == DType::float16)
    function(static_cast<float16*>(nullptr));
  else
    function(static_cast<float*>(nullptr));
}

__device__ __forceinline__ float load_element(const void* data, DType dtype, int64_t at) {
  float value = 0.0f;
  with_device_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    value = to_float(static_cast<const T*>(data)[at]);
  });
  return value;
}

__device__ __forceinline__ void store_element(void* data, DType dtype, int64_t at, float value) {
  with_device_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    static_cast<T*>(data)[at] = from_float<T>(value);
  });
}

// Eight neighbours, aligned to 16 bytes.
inline constexpr int kEight = 8;

// As they are in memory: so loads of any type, unconverted, run ahead.
struct Raw {
  uint4 low, high;  // high: the second half of float32
};

__device__ __forceinline__ Raw load_raw(const void* data, DType dtype, int64_t at) {
  Raw raw;
  if (dtype == DType::float32) {
    const auto* from = reinterpret_cast<const uint4*>(static_cast<const float*>(data) + at);
    raw.low = from[0];
    raw.high = from[1];
  } else {
    raw.low = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + at);
  }
  return raw;
}

__device__ __forceinline__ void to_floats(const Raw& raw, DType dtype, float (&values)[kEight]) {
  with_device_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    to_floats(reinterpret_cast<const Words<T, kEight>&>(raw), values);
  });
}

__device__ __forceinline__ void store_eight(void* data, DType dtype, int64_t at,
                                            const float (&values)[kEight]) {
  with_device_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto words = to_words<T>(values);
    auto* to = reinterpret_cast<uint4*>(static_cast<T*>(data) + at);
#pragma unroll
    for (int i = 0; i < kEight / kVectorSize<T>; ++i)
      to[i] = reinterpret_cast<const uint4(&)[kEight / kVectorSize<T>]>(words)[i];
  });
}

}  // namespace ssmcore::cuda
