// The sums that the general backward's blocks leave, each added up in a fixed order.
#pragma once

#include "general_bwd_tile.cuh"

namespace ssmcore::cuda {

// dB or dC of a segment: partial is (slices of all heads, batch, segment_l, quads). A thread has a
// number.
template <typename T, bool kComplex>
__global__ void __launch_bounds__(GeneralBwdShape::kThreads)
    selective_scan_general_bwd_steps_kernel(StridedGradient<4> gradient, int64_t ngroups,
                                            int64_t group_slices, int64_t dstate, GeneralBwdShape s,
                                            Segment segment, const RealOf<T>* partial) {
  constexpr int kParts = kComplex ? 2 : 1;
  const int64_t steps = segment.end - segment.begin, numbers = dstate * kParts;
  const int64_t width = s.quads * GeneralBwdShape::kQuad,
                count = s.batch * ngroups * steps * numbers;
  const int64_t stride = s.batch * s.segment_l * width;  // between slices
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < count;
       e += int64_t(gridDim.x) * blockDim.x) {
    const int64_t number = e % numbers, step = e / numbers % steps;
    const int64_t group = e / numbers / steps % ngroups, batch = e / numbers / steps / ngroups;
    const RealOf<T>* from =
        partial + group * group_slices * stride + (batch * s.segment_l + step) * width + number;
    RealOf<T> sum = 0;
#pragma unroll 8
    for (int64_t slice = 0; slice < group_slices; ++slice) sum += from[slice * stride];
    const int64_t t = kParts * (segment.begin + step) + number % kParts;
    put(static_cast<T*>(
            gradient.data)[batch * gradient.stride[0] + group * gradient.stride[1] +
                           number / kParts * gradient.stride[2] + t * gradient.stride[3]],
        sum, gradient.accumulate);
  }
}

// dA, constant dB and dC, dD and ddelta_bias, over the slices of rows. A block has a tile.
template <typename Real, bool kComplex>
__global__ void __launch_bounds__(GeneralBwdShape::kThreads)
    selective_scan_general_bwd_channels_kernel(const __grid_constant__ SelectiveScanBwdParams p,
                                               GeneralBwdShape s, GeneralBwdMemory<Real> memory) {
  const int64_t tiles = p.fwd.nheads * s.tiles;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const TilePlace<Real, kComplex> place(p.fwd, s, index / s.tiles, index % s.tiles);
    const StridedGradient<3>* const gradients[] = {&p.dA, &p.constant_dB, &p.constant_dC};
    for (int i = 0; i < 3; ++i) {
      if (gradients[i]->data == nullptr) continue;
      Vector<Real, GeneralBwdShape::kQuad> sum{};
      for (int64_t slice = 0; slice < s.row_slices; ++slice) {
        const auto& from =
            memory.sums[((slice * tiles + index) * 3 + i) * blockDim.x + threadIdx.x];
        for (int j = 0; j < GeneralBwdShape::kQuad; ++j) sum.value[j] += from.value[j];
      }
      place.store(*gradients[i], sum);
    }
    const int d = threadIdx.x;
    if (d >= place.channels) continue;
    const StridedGradient<2>* const of_channels[] = {&p.dD, &p.ddelta_bias};
    for (int i = 0; i < 2; ++i) {
      const StridedGradient<2>& to = *of_channels[i];
      if (to.data == nullptr) continue;
      Real sum = 0;
      for (int64_t slice = 0; slice < s.row_slices; ++slice)
        sum += memory.channel_sums[((slice * tiles + index) * 2 + i) * s.tile_d + d];
      put(static_cast<Real*>(
              to.data)[place.head * to.stride[0] + (place.first_d + d) * to.stride[1]],
          sum, to.accumulate);
    }
  }
}

}  // namespace ssmcore::cuda
