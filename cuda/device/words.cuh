// Neighbours of an activation type, kept as the words they are in memory: as an array of 16-bit
// values each would take a register, and often a load or store of its own.
#pragma once

#include "types.cuh"

namespace ssmcore::cuda {

// N values of T, 2 to 16 bytes.
template <typename T, int N>
struct Words {
  static constexpr int kBytes = N * static_cast<int>(sizeof(T));
  using Word = std::conditional_t<kBytes == 2, uint16_t, uint32_t>;
  static constexpr int kCount = kBytes / static_cast<int>(sizeof(Word));

  Vector<Word, kCount> words;
};

// The pointer must be aligned to all N.
template <int N, typename T>
__device__ __forceinline__ Words<T, N> load_words(const T* from) {
  using Word = typename Words<T, N>::Word;
  return {load_vector<Words<T, N>::kCount>(reinterpret_cast<const Word*>(from))};
}
// To global memory. 16 bytes by name: the compiler may take the assignment of a struct apart into a
// store a word.
template <typename T, int N>
__device__ __forceinline__ void store_words(T* to, const Words<T, N>& from) {
  const auto& value = from.words.value;
  if constexpr (Words<T, N>::kBytes == 16)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value[0]), "r"(value[1]),
                 "r"(value[2]), "r"(value[3])
                 : "memory");
  else
    store_vector(reinterpret_cast<typename Words<T, N>::Word*>(to), from.words);
}

template <typename T, int N>
__device__ __forceinline__ void to_floats(const Words<T, N>& from, float (&to)[N]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = __uint_as_float(from.words.value[i]);
  } else if constexpr (N == 1) {
    to[0] = to_float(reinterpret_cast<const T&>(from.words.value[0]));
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const uint32_t word = from.words.value[i];
      if constexpr (std::is_same_v<T, bfloat16>) {
        to[2 * i] = __uint_as_float(word << 16);
        to[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
      } else {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
      }
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ Words<T, N> to_words(const float (&from)[N]) {
  Words<T, N> to;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) to.words.value[i] = __float_as_uint(from[i]);
  } else if constexpr (N == 1) {
    const T value = from_float<T>(from[0]);
    to.words.value[0] = reinterpret_cast<const uint16_t&>(value);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
        to.words.value[i] = reinterpret_cast<const uint32_t&>(pair);
      } else {
        const __half2 pair = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
        to.words.value[i] = reinterpret_cast<const uint32_t&>(pair);
      }
    }
  }
  return to;
}

}  // namespace ssmcore::cuda
