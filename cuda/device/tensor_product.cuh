// Products of small matrices on the tensor cores, which multiply in TF32 (10 bits of mantissa) and
// add in float32.
#pragma once

#include <cstdint>

#include "types.cuh"

namespace ssmcore::cuda {

// sum += a · b for a (16, 8) and b (8, 8). With g = lane / 4 and k = lane % 4, a thread has
// a[g][k], a[g + 8][k], a[g][k + 4], a[g + 8][k + 4]; b[k][g], b[k + 4][g]; and of the sum [g][2k],
// [g][2k + 1], [g + 8][2k], [g + 8][2k + 1]. The low 13 bits of a and b are cut off.
__device__ __forceinline__ void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The part of a factor that TF32 holds.
__device__ __forceinline__ uint32_t cut_to_tf32(float value) {
  return __float_as_uint(value) & 0xffffe000u;
}

// A factor `b` as add_product() wants it: for bfloat16 longer by the two half units by which both
// factors are cut short on average.
template <typename T>
__device__ __forceinline__ float prepare_factor(float b) {
  return std::is_same_v<T, bfloat16> ? b * (1 + 0x1p-10f) : b;
}

// The same as accurately as results of T ask for: all but bfloat16 have the factors split into what
// TF32 holds and the rest.
template <typename T>
__device__ __forceinline__ void add_product(float (&sum)[4], const float (&a)[4],
                                            const float (&b)[2]) {
  constexpr bool kSplit = !std::is_same_v<T, bfloat16>;
  uint32_t high_a[4], high_b[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) high_a[i] = kSplit ? cut_to_tf32(a[i]) : __float_as_uint(a[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) high_b[i] = kSplit ? cut_to_tf32(b[i]) : __float_as_uint(b[i]);
  if constexpr (kSplit) {
    uint32_t low_a[4], low_b[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) low_a[i] = __float_as_uint(a[i] - __uint_as_float(high_a[i]));
#pragma unroll
    for (int i = 0; i < 2; ++i) low_b[i] = __float_as_uint(b[i] - __uint_as_float(high_b[i]));
    multiply_tf32(sum, low_a, high_b);
    multiply_tf32(sum, high_a, low_b);
  }
  multiply_tf32(sum, high_a, high_b);
}

}  // namespace ssmcore::cuda
