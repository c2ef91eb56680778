// Neighbouring threads that share a piece of work, such as a row: its lanes. A power of two up to a
// warp, or a whole block.
#pragma once

#include <cstdint>

namespace ssmcore::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kMostLanes = 1024;

// Lanes for `size` pieces: a power of two up to a warp, or whole warps up to `most`.
inline int lanes_for(int64_t size, int64_t most) {
  if (size > kWarp) {
    const int64_t whole = (size + kWarp - 1) / kWarp * kWarp;
    return static_cast<int>(whole < most ? whole : most);
  }
  int lanes = 1;
  while (lanes < size) lanes *= 2;
  return lanes;
}

// Of a block: the lanes of one piece of work, or `few` threads for several.
inline int threads_for(int lanes, int few) {
  return lanes > kWarp ? lanes : few;
}

// The sums over the lanes, in a fixed order, for each of them. Every thread of the block must come.
// Calls in a loop take turns 0 and 1: the memory of one is read until the next but one.
template <int kValues>
__device__ __forceinline__ void sum_over_lanes(float (&values)[kValues], int lanes, int turn = 0) {
  for (int offset = min(lanes, kWarp) / 2; offset > 0; offset /= 2)
#pragma unroll
    for (float& value : values) value += __shfl_xor_sync(0xffffffff, value, offset);
  if (lanes <= kWarp) return;
  __shared__ float warps[2][kMostLanes / kWarp][kValues];
  if (threadIdx.x % kWarp == 0)
#pragma unroll
    for (int i = 0; i < kValues; ++i) warps[turn][threadIdx.x / kWarp][i] = values[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = 0.0f;
    for (int warp = 0; warp < lanes / kWarp; ++warp) values[i] += warps[turn][warp][i];
  }
}

}  // namespace ssmcore::cuda
