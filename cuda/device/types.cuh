// Activation types on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace ssmcore::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ __forceinline__ float to_float(float v) {
  return v;
}
__device__ __forceinline__ float to_float(bfloat16 v) {
  return __bfloat162float(v);
}
__device__ __forceinline__ float to_float(float16 v) {
  return __half2float(v);
}

template <typename T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (sizeof(T) == sizeof(float))
    return v;
  else if constexpr (std::is_same_v<T, bfloat16>)
    return __float2bfloat16_rn(v);
  else
    return __float2half_rn(v);
}

// The first and the second of two neighbours in a word.
__device__ __forceinline__ float low_half(uint32_t word, bfloat16) {
  return __uint_as_float(word << 16);
}
__device__ __forceinline__ float high_half(uint32_t word, bfloat16) {
  return __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ float low_half(uint32_t word, float16) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
}
__device__ __forceinline__ float high_half(uint32_t word, float16) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}

// N neighbours, loaded and stored at once: 16 bytes at most. The pointer must be aligned to it.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T value[N];
};

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}
template <typename T, int N>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

// Elements that make 16 bytes.
template <typename T>
inline constexpr int kVectorSize = 16 / static_cast<int>(sizeof(T));

}  // namespace ssmcore::cuda
