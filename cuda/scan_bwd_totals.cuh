// The last sums of the scan's backward, over what its blocks left, in a fixed order.
#pragma once

#include "scan_bwd_shape.cuh"

namespace ssmcore::cuda {

// dB (`which` 0) or dC (1): a block has tiles of kSteps steps of one group.
template <typename T>
__global__ void __launch_bounds__(256)
    scan_bwd_coefficients_kernel(const __grid_constant__ SelectiveScanBwdParams p,
                                 const __grid_constant__ ScanBwdPlan plan, const float* products,
                                 int which) {
  constexpr int kDstate = ScanBwdShape<T>::kDstate, kSteps = 16;
  __shared__ float tile[kSteps][kDstate + 1];
  const SelectiveScanFwdParams& fwd = p.fwd;
  const StridedGradient<4>& gradient = which == 0 ? p.dB : p.dC;
  const int64_t groups = which == 0 ? p.ngroups_B : p.ngroups_C;
  const int64_t batch = fwd.cu_seqlens.data ? 1 : fwd.rows;
  const int64_t of_row = pieces_of(fwd.seqlen, kSteps);
  const int64_t slices = fwd.nheads / groups * plan.blocks_d;  // that a group has
  const int64_t per_slice = batch * fwd.seqlen * 2 * kDstate;
  const bool along_steps = gradient.stride[3] == 1;
  const int thread = static_cast<int>(threadIdx.x), slow = thread / 16, fast = thread % 16;
  for (int64_t i = blockIdx.x; i < batch * groups * of_row; i += gridDim.x) {
    const int64_t first_t = i % of_row * kSteps, group = i / of_row % groups;
    const int64_t row = i / of_row / groups;
    const int steps = static_cast<int>(min(int64_t{kSteps}, fwd.seqlen - first_t));
    if (slow < steps) {
      const float* from = products + group * slices * per_slice +
                          (row * fwd.seqlen + first_t + slow) * 2 * kDstate + which * kDstate +
                          fast;
      float sum = 0;
#pragma unroll 8
      for (int64_t slice = 0; slice < slices; ++slice) sum += from[slice * per_slice];
      tile[slow][fast] = sum;
    }
    __syncthreads();
    const int step = along_steps ? fast : slow, n = along_steps ? slow : fast;
    if (step < steps && n < fwd.dstate) {
      T* const to = static_cast<T*>(gradient.data) + row * gradient.stride[0] +
                    group * gradient.stride[1] + n * gradient.stride[2] +
                    (first_t + step) * gradient.stride[3];
      *to = from_float<T>(tile[step][n] + (gradient.accumulate ? to_float(*to) : 0.0f));
    }
    __syncthreads();
  }
}

// dA, dD and ddelta_bias. A thread has one of them, of one channel.
static __global__ void __launch_bounds__(256)
    scan_bwd_channels_kernel(const __grid_constant__ SelectiveScanBwdParams p,
                             const __grid_constant__ ScanBwdPlan plan, const float* sums) {
  constexpr int kDstate = ScanBwdShape<float>::kDstate, kOfChannel = kDstate + 2;
  const SelectiveScanFwdParams& fwd = p.fwd;
  const int64_t count = plan.channels * kOfChannel, slices = plan.slices * plan.parts;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < count;
       at += int64_t{gridDim.x} * blockDim.x) {
    const int64_t n = at % kOfChannel, channel = at / kOfChannel;
    const int64_t head = channel / fwd.headdim, d = channel % fwd.headdim;
    const auto store = [&](const auto& gradient, int64_t n, int64_t stride_n) {
      if (!gradient.data) return;
      float sum = 0;
#pragma unroll 8
      for (int64_t slice = 0; slice < slices; ++slice) sum += sums[slice * count + at];
      float* const to = static_cast<float*>(gradient.data) + head * gradient.stride[0] +
                        d * gradient.stride[1] + n * stride_n;
      *to = sum + (gradient.accumulate ? *to : 0.0f);
    };
    if (n < fwd.dstate)
      store(p.dA, n, p.dA.stride[2]);
    else if (n == kDstate)
      store(p.dD, 0, 0);
    else if (n == kDstate + 1)
      store(p.ddelta_bias, 0, 0);
  }
}

}  // namespace ssmcore::cuda
