// Products of small matrices on the tensor cores, added in float32, and loads of their operands. In
// the comments, with g = lane / 4 and k = lane % 4.
#pragma once

#include <cstdint>

#include "types.cuh"

namespace ssmcore::cuda {

// sum += a · b for a (16, 16) and b (16, 8) in float16, of which a word holds two neighbours along
// the inner dimension. A thread has a[g][2k], a[g + 8][2k], a[g][2k + 8], a[g + 8][2k + 8];
// b[2k][g], b[2k + 8][g]; and of the sum [g][2k], [g][2k + 1], [g + 8][2k], [g + 8][2k + 1].
__device__ __forceinline__ void multiply_f16(float (&sum)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for a (16, 8) and b (8, 8) in TF32, which has 10 bits of mantissa: the low 13 bits of a
// and b are cut off. A thread has a[g][k], a[g + 8][k], a[g][k + 4], a[g + 8][k + 4]; b[k][g],
// b[k + 4][g]; and the same of the sum.
__device__ __forceinline__ void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Products of float32 on the tensor cores: each factor is split into what TF32 holds and the rest,
// and only the product of the rests is left out.
__device__ __forceinline__ void multiply_split(float (&sum)[4], const float (&a)[4],
                                               const float (&b)[2]) {
  const auto cut = [](float value) { return __float_as_uint(value) & 0xffffe000u; };
  const auto rest = [](float value, uint32_t high) {
    return __float_as_uint(value - __uint_as_float(high));
  };
  uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    high_a[i] = cut(a[i]);
    low_a[i] = rest(a[i], high_a[i]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    high_b[i] = cut(b[i]);
    low_b[i] = rest(b[i], high_b[i]);
  }
  multiply_tf32(sum, low_a, high_b);
  multiply_tf32(sum, high_a, low_b);
  multiply_tf32(sum, high_a, high_b);
}

// Four (8, 8) matrices of 16-bit elements in shared memory: lane 8 i + j gives row j of matrix i,
// 16 aligned bytes. A thread gets elements [g][2k] and [g][2k + 1] of each, or if kTransposed,
// [2k][g] and [2k + 1][g].
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&word)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(at)
                 : "memory");
}

// Two values in one word, the first in its low half.
__device__ __forceinline__ uint32_t pack_f16(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace ssmcore::cuda
