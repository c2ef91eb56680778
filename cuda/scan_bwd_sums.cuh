// Sums of products over states and over channels in the scan's backward, on the tensor cores: of
// states and C, which is y, of states and dy, which is dC, of their gradients and B, which is the
// gradient of Δu, and of these and Δu, which is dB.
#pragma once

#include "scan_bwd_history.cuh"
#include "scan_bwd_scales.cuh"

namespace ssmcore::cuda {

// Of kGroup steps at once, one in each column: the matrix of a step is multiplied by its column and
// by zeros. So an infinity or NaN reaches other steps of its group.
template <typename T>
class ScanBwdSums {
  using Shape = ScanBwdShape<T>;
  using History = ScanBwdHistory<T>;
  static constexpr int kGroup = 8, kGroups = Shape::kTile / kGroup;
  static constexpr int kBlocks = Shape::kBlockD / 16;  // of channels

 public:
  // Steps in whole groups.
  __device__ static int whole(int steps) { return (steps + kGroup - 1) / kGroup * kGroup; }

  explicit __device__ ScanBwdSums(const ScanBwdMemory<T>& memory)
      : memory_(memory), lane_(threadIdx.x % 32), history_(memory, lane_) {}

  // A vector by which all matrices are multiplied: rows of `plane`, whose scale is `scale`.
  struct Factors {
    const float* plane;
    float scale;
  };

  // The warps of a block share this. What the history has is times `scale`. `over_states`: the
  // products with `coefficients` are summed up into rows of y's plane. `products`: those with
  // `inputs` are summed up over channels, to (steps, 2, kDstate), unless it is null.
  __device__ __forceinline__ void take(int steps, float scale, bool over_states,
                                       const Factors& coefficients, const Factors& inputs,
                                       float* products) const {
    const float unscaled = inverse_power(scale);
#pragma unroll 1
    for (int job = threadIdx.x / 32; job < 2 * kGroups; job += Shape::kWarps) {
      const int first = job % kGroups * kGroup;
      if (first >= steps) continue;
      if (job < kGroups) {
        if (over_states) take_over_states(first, coefficients, unscaled);
      } else if (products) {
        take_over_channels(first, inputs, unscaled, products, steps);
      }
    }
  }

 private:
  template <bool kOverStates>
  __device__ __forceinline__ typename History::Right right(const Factors& factors, int first_row,
                                                           int first) const {
    float factor[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + History::template inner<kOverStates>(lane_, i);
      factor[i] = factors.plane[row * Shape::kRow + first + lane_ / 4] * factors.scale;
    }
    return History::right(factor);
  }
  // Multiplies a group by `columns`, the same one or one for each sixteen channels. Column lane / 4
  // belongs to that step of the group.
  template <bool kOverStates, int kColumns>
  __device__ __forceinline__ void multiply(
      float (&sum)[kBlocks][4], int first,
      const typename History::Right (&columns)[kColumns]) const {
    constexpr int kAhead = 2;  // steps that are loaded at once
    typename History::Left next[kAhead][kBlocks];
    const auto load = [&](int i) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
          next[j][block] = history_.template left<kOverStates>(1 + first + i + j, 16 * block);
    };
    load(0);
#pragma unroll 1  // or the compiler would load them one by one
    for (int i = 0;; i += kAhead) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
          History::multiply(sum[block], next[j][block],
                            History::only_if(lane_ / 4 == i + j, columns[block % kColumns]));
      if (i + kAhead == kGroup) break;
      load(i + kAhead);
    }
  }

  __device__ __forceinline__ void take_over_states(int first, const Factors& factors,
                                                   float unscaled) const {
    const typename History::Right columns[] = {right<true>(factors, 0, first)};
    const float once = inverse_power(factors.scale);
    float sum[kBlocks][4] = {};
    multiply<true>(sum, first, columns);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (float& of : sum[block]) of = of * once * unscaled;
      float* const to = memory_.y(16 * block + lane_ / 4) + first + lane_ % 4 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(sum[block][0], sum[block][1]);
      *reinterpret_cast<float2*>(to + 8 * Shape::kRow) = make_float2(sum[block][2], sum[block][3]);
    }
  }

  __device__ __forceinline__ void take_over_channels(int first, const Factors& factors,
                                                     float unscaled, float* products,
                                                     int steps) const {
    const float once = inverse_power(factors.scale);
    typename History::Right columns[kBlocks];
    float sum[kBlocks][4] = {};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
      columns[block] = right<false>(factors, 16 * block, first);
    multiply<false>(sum, first, columns);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int block = 1; block < kBlocks; ++block) sum[0][i] += sum[block][i];
      const int step = first + lane_ % 4 * 2 + i % 2, n = lane_ / 4 + i / 2 * 8;
      if (step < steps) products[step * 2 * Shape::kDstate + n] = sum[0][i] * once * unscaled;
    }
  }

  const ScanBwdMemory<T> memory_;
  const int lane_;
  const History history_;
};

}  // namespace ssmcore::cuda
