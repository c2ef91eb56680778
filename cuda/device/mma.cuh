// Tensor cores.
#pragma once

#include "types.cuh"

namespace ssmcore::cuda {

// sum (16, 8) += a (16, 16) b (16, 8), over a warp: of lane = 4 g + t,
//   a[i] is row g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next,
//   b[i] is rows 2 t + 8 i and the next, column g,
//   sum[i] is row g + 8 (i / 2), column 2 t + i % 2.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&sum)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace ssmcore::cuda
