// The recurrence of scan_bwd_kernel.cuh, serially in time: forward over a tile, and backward.
#pragma once

#include "device/math.cuh"
#include "device/tensor_product.cuh"
#include "scan_bwd_shape.cuh"

namespace ssmcore::cuda {

// What a thread has of the states: kStates neighbours of one channel. Lane bits 0 to 2 are the
// channel of the warp, 3 and 4 the states.
template <bool kAlongSteps>
struct ScanBwdStates : ScanBwdShape {
  const int lane, warp, quarter;  // of the states
  const int row, d, first_n;      // of a plane; channel of the block
  float A[kStates];               // times log2(e)

  __device__ ScanBwdStates(const ScanBwdBlock& block)
      : lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        quarter(lane / kWarpD),
        row(warp * kWarpD + lane % kWarpD),
        d(channel_of<kAlongSteps>(row)),
        first_n(quarter * kStates) {
    load(A, block.p.fwd.A, static_cast<const float*>(block.p.fwd.A.data), block);
#pragma unroll
    for (int i = 0; i < kStates; ++i) A[i] *= kLog2e;
  }

  __device__ __forceinline__ bool exists(const ScanBwdBlock& block, int i) const {
    return d < block.channels && first_n + i < static_cast<int>(block.p.fwd.dstate);
  }
  // Element i of an operand (.., nheads, headdim, dstate) at `data`.
  template <typename Float, int kRank>
  __device__ __forceinline__ Float* at(const Strided<kRank>& operand, Float* data,
                                       const ScanBwdBlock& block, int i) const {
    return data + block.head * operand.stride[kRank - 3] +
           (block.first_d + d) * operand.stride[kRank - 2] +
           (first_n + i) * operand.stride[kRank - 1];
  }
  // Zeros where `data` is null.
  template <int kRank>
  __device__ __forceinline__ void load(float (&to)[kStates], const Strided<kRank>& operand,
                                       const float* data, const ScanBwdBlock& block) const {
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      to[i] = data && exists(block, i) ? *at(operand, data, block, i) : 0.0f;
  }
  // From the row's slot of states.
  __device__ __forceinline__ void load_state(float (&to)[kStates], const Strided<4>& states,
                                             const ScanBwdBlock& block) const {
    const bool given = states.data && block.row.slot >= 0;
    load(to, states,
         given ? static_cast<const float*>(states.data) + block.row.slot * states.stride[0]
               : nullptr,
         block);
  }
};

// The sum over the four quarters: of the first step in the first of them, and so on.
__device__ __forceinline__ float sum_over_quarters(const float (&value)[4], int quarter) {
  constexpr int kWarpD = ScanBwdShape::kWarpD;
  const bool upper = quarter & 2, odd = quarter & 1;
  const auto exchange = [](bool second, float a, float b, int lanes) {
    return (second ? b : a) + __shfl_xor_sync(~0u, second ? a : b, lanes);
  };
  return exchange(odd, exchange(upper, value[0], value[2], 2 * kWarpD),
                  exchange(upper, value[1], value[3], 2 * kWarpD), kWarpD);
}

// Sums over the warp's channels of products of states and a factor, in four steps: the tensor cores
// multiply the states of two steps by two columns a step, of which only those of that step are not
// zero. Rows of the product are states of one or the other half of the channels, columns steps and
// halves of the channels; where the halves differ the sum means nothing.
template <typename T>
class ChannelSums {
 public:
  // Adds steps `step` and `step` + 1, by the thread's states in each; `factor` is that of its
  // channel in step `quarter`.
  template <int step>
  __device__ __forceinline__ void add(const float (&even)[4], const float (&odd)[4], float factor,
                                      int quarter) {
    const float factors[2] = {quarter == step ? factor : 0.0f, quarter == step + 1 ? factor : 0.0f};
    add_product<T>(low_, {even[0], even[1], odd[0], odd[1]}, factors);
    add_product<T>(high_, {even[2], even[3], odd[2], odd[3]}, factors);
  }

  // Stores (steps, kStepProducts), of which dstate are these.
  __device__ __forceinline__ void store(float* to, int lane) const {
    const bool second = lane & 4;  // half of the channels: keeps the upper two states
    const auto exchange = [second](float keep0, float keep1, float send0, float send1) {
      return (second ? keep1 : keep0) + __shfl_xor_sync(~0u, second ? send1 : send0, 4);
    };
    const float2 sums{exchange(low_[0], high_[1], high_[0], low_[1]),
                      exchange(low_[2], high_[3], high_[2], low_[3])};
    const int n = lane / 8 * 4 + (second ? 2 : 0);
    *reinterpret_cast<float2*>(to + lane % 4 * ScanBwdShape::kStepProducts + n) = sums;
  }

 private:
  float low_[4] = {}, high_[4] = {};  // states 0 and 1, 2 and 3
};

// One thread of the main pass.
template <typename T, bool kAlongSteps>
struct ScanBwdRecurrence : ScanBwdStates<kAlongSteps> {
  using States = ScanBwdStates<kAlongSteps>;
  using Shape = ScanBwdShape;
  using States::A, States::lane, States::quarter, States::row, States::warp;
  static constexpr int kStates = Shape::kStates, kSpan = Shape::kSpan;

  const ScanBwdMemory memory;
  float dh[kStates];  // of the states before the steps done, from these
  float dA[kStates] = {};

  __device__ ScanBwdRecurrence(const ScanBwdBlock& block, const ScanBwdMemory& memory)
      : States(block), memory(memory) {}

  // Leaves the states before each span, h being those before the tile.
  __device__ __forceinline__ void find_starts(float (&h)[kStates], int spans) const {
#pragma unroll 1
    for (int span = 0; span < spans; ++span) {
      store_four(memory.start(warp, span, lane), {h[0], h[1], h[2], h[3]});
      if (span + 1 == spans) break;
#pragma unroll
      for (int t = 0; t < kSpan; t += 4) {
        const int at = span * kSpan + t;
        const Four dt = load_four(memory.delta(row) + at),
                   dt_u = load_four(memory.delta_u(row) + at);
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          const Four B = load_four(memory.coefficients(0, this->first_n + i) + at);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            h[i] = exp2_approx(dt.value[j] * A[i]) * h[i] + dt_u.value[j] * B.value[j];
        }
      }
    }
  }

  // Goes over a span forward, and backward. Leaves y, the gradients of Δu and of Δ by way of the
  // decay, and what the warp adds to dB and dC.
  __device__ __forceinline__ void run_span(int span, float* products) {
    float decay[kSpan][kStates], h[kSpan + 1][kStates];  // before each step and after the last
    const Four start = load_four(memory.start(warp, span, lane));
    __syncwarp();  // all have read what is now overwritten
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[0][i] = start.value[i];
#pragma unroll
    for (int t = 0; t < kSpan; t += 4) {
      const int at = span * kSpan + t;
      const Four dt = load_four(memory.delta(row) + at), dt_u = load_four(memory.delta_u(row) + at);
      float y[4] = {};
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const Four B = load_four(memory.coefficients(0, this->first_n + i) + at),
                   C = load_four(memory.coefficients(1, this->first_n + i) + at);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          decay[t + j][i] = exp2_approx(dt.value[j] * A[i]);
          h[t + j + 1][i] = decay[t + j][i] * h[t + j][i] + dt_u.value[j] * B.value[j];
          y[j] += C.value[j] * h[t + j + 1][i];
        }
      }
      const float dy = memory.dy(row)[at + quarter];
      ChannelSums<T> dC;
      dC.template add<0>(h[t + 1], h[t + 2], dy, quarter);
      dC.template add<2>(h[t + 3], h[t + 4], dy, quarter);
      dC.store(products + t * Shape::kStepProducts + Shape::kDstate, lane);
      memory.y(row, at / 4)[quarter] = sum_over_quarters(y, quarter);
    }
#pragma unroll
    for (int t = kSpan - 4; t >= 0; t -= 4) {
      const int at = span * kSpan + t;
      const Four dt = load_four(memory.delta(row) + at), dy = load_four(memory.dy(row) + at);
      float of_step[4][kStates], dx[4] = {}, by_decay[4] = {};
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const Four B = load_four(memory.coefficients(0, this->first_n + i) + at),
                   C = load_four(memory.coefficients(1, this->first_n + i) + at);
#pragma unroll
        for (int j = 3; j >= 0; --j) {
          of_step[j][i] = dh[i] + dy.value[j] * C.value[j];
          dx[j] += of_step[j][i] * B.value[j];
          dh[i] = decay[t + j][i] * of_step[j][i];
          const float q = dh[i] * h[t + j][i];
          dA[i] += dt.value[j] * q;
          by_decay[j] += q * A[i];
        }
      }
      float* const dt_u = memory.delta_u(row) + at + quarter;
      ChannelSums<T> dB;
      dB.template add<0>(of_step[0], of_step[1], *dt_u, quarter);
      dB.template add<2>(of_step[2], of_step[3], *dt_u, quarter);
      dB.store(products + t * Shape::kStepProducts, lane);
      memory.dx(row, at / 4)[quarter] = sum_over_quarters(dx, quarter);
      *dt_u = sum_over_quarters(by_decay, quarter);
    }
  }
};

}  // namespace ssmcore::cuda
