// Packed sequences of the causal convolution, as its kernels read cu_seqlens.
#pragma once

#include "../cpp/src/causal_conv1d_params.h"
#include "device/fault.cuh"

namespace ssmcore::cuda {

// Every entry of cu_seqlens, also those that no tile comes to see.
__device__ inline void check_cu_seqlens(const CausalConv1dFwdParams& p, uint32_t* faults) {
  if (!p.cu_seqlens.data) return;
  const auto* entries = static_cast<const int32_t*>(p.cu_seqlens.data);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i <= p.rows;
       i += threads) {
    const int64_t entry = entries[i * p.cu_seqlens.stride[0]];
    const int64_t before = i == 0 ? 0 : entries[(i - 1) * p.cu_seqlens.stride[0]];
    if (entry < before || (i == 0 && entry != 0) || (i == p.rows && entry != p.seqlen))
      report(faults, Fault::causal_conv1d_cu_seqlens);
  }
}

// Packed sequences, where they are clamped to the steps that there are.
struct PackedRows {
  const CausalConv1dFwdParams& p;

  // Where a sequence begins, and the one before ends.
  __device__ int64_t boundary(int64_t row) const {
    const int64_t at = static_cast<const int32_t*>(p.cu_seqlens.data)[row * p.cu_seqlens.stride[0]];
    return min(max(at, int64_t{0}), p.seqlen);
  }
  // The first sequence that begins at step t or after.
  __device__ int64_t first_from(int64_t t) const {
    int64_t low = 0, high = p.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (boundary(middle) < t)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

}  // namespace ssmcore::cuda
