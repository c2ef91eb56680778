// The recurrence of scan_bwd_kernel.cuh, serially in time: forward over a tile, and backward.
#pragma once

#include "scan_bwd_history.cuh"
#include "scan_bwd_scales.cuh"

namespace ssmcore::cuda {

// What a thread has of the states: kStates neighbours of one channel. Lane bits 0 to 2 are the
// channel of the warp, 3 and 4 the states.
template <typename T, bool kAlongSteps>
struct ScanBwdStates : ScanBwdShape<T> {
  using Shape = ScanBwdShape<T>;
  using Block = ScanBwdBlock<T>;
  static constexpr int kStates = Shape::kStates;
  const int quarter;          // of the states
  const int row, d, first_n;  // of a plane; channel of the block
  float A[kStates];           // times log2(e)

  explicit __device__ ScanBwdStates(const Block& block)
      : quarter(threadIdx.x % 32 / Shape::kWarpD),
        row(threadIdx.x / 32 * Shape::kWarpD + threadIdx.x % Shape::kWarpD),
        d(Shape::template channel_of<kAlongSteps>(row)),
        first_n(quarter * kStates) {
    load(A, block, of_block(block.p.fwd.A, static_cast<const float*>(block.p.fwd.A.data), block),
         block.p.fwd.A);
#pragma unroll
    for (int i = 0; i < kStates; ++i) A[i] *= kLog2e;
  }

  __device__ __forceinline__ bool exists(const Block& block, int i) const {
    return d < block.channels && first_n + i < static_cast<int>(block.p.fwd.dstate);
  }
  // Where an operand (.., nheads, headdim, dstate) at `data` begins for the block.
  template <typename Float, int kRank>
  __device__ __forceinline__ static Float* of_block(const Strided<kRank>& operand, Float* data,
                                                    const Block& block) {
    return data + block.head * operand.stride[kRank - 3] +
           block.first_d * operand.stride[kRank - 2];
  }
  // Its element i.
  template <typename Float, int kRank>
  __device__ __forceinline__ Float* at(const Strided<kRank>& operand, Float* of_block,
                                       int i) const {
    return of_block + d * operand.stride[kRank - 2] + (first_n + i) * operand.stride[kRank - 1];
  }
  template <int kRank>
  __device__ __forceinline__ void load(float (&to)[kStates], const Block& block,
                                       const float* of_block, const Strided<kRank>& operand) const {
    const float* const from = at(operand, of_block, 0);
    if (exists(block, kStates - 1) && operand.stride[kRank - 1] == 1 &&
        reinterpret_cast<uintptr_t>(from) % sizeof(Four) == 0) {
      const Four four = load_four(from);
#pragma unroll
      for (int i = 0; i < kStates; ++i) to[i] = four.value[i];
    } else {
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        to[i] = exists(block, i) ? from[i * operand.stride[kRank - 1]] : 0.0f;
    }
  }
  // From a slot of states, zeros if it is negative or there are none.
  __device__ __forceinline__ void load_state(float (&to)[kStates], const Block& block,
                                             const Strided<4>& states, int64_t slot) const {
    if (states.data && slot >= 0) {
      const float* const data = static_cast<const float*>(states.data) + slot * states.stride[0];
      load(to, block, of_block(states, data, block), states);
    } else {
#pragma unroll
      for (float& state : to) state = 0;
    }
  }
};

// The sum over the four quarters: of the first step in the first of them, and so on.
__device__ __forceinline__ float sum_over_quarters(const float (&value)[4], int quarter) {
  constexpr int kLanes = 8;  // of a quarter
  const bool upper = quarter & 2, odd = quarter & 1;
  const auto exchange = [](bool second, float a, float b, int lanes) {
    return (second ? b : a) + __shfl_xor_sync(~0u, second ? a : b, lanes);
  };
  return exchange(odd, exchange(upper, value[0], value[2], 2 * kLanes),
                  exchange(upper, value[1], value[3], 2 * kLanes), kLanes);
}

// One thread of the main pass.
template <typename T, bool kAlongSteps>
struct ScanBwdRecurrence : ScanBwdStates<T, kAlongSteps> {
  using States = ScanBwdStates<T, kAlongSteps>;
  using Shape = ScanBwdShape<T>;
  using History = ScanBwdHistory<T>;
  using States::A, States::quarter;
  static constexpr int kStates = Shape::kStates;

  // In shared memory: its channel's steps, its states' coefficients, and what is left of the tile.
  float *const steps_at, *const coefficients_at, *const history;
  float dh[kStates];  // of the states before the steps done, from these
  float dA[kStates] = {};

  explicit __device__ ScanBwdRecurrence(const ScanBwdBlock<T>& block)
      : States(block),
        steps_at(block.memory.delta(this->row)),
        coefficients_at(block.memory.coefficients(0, this->first_n)),
        history(History::at(block.memory, this->row, this->first_n)) {}

  // From the states before the tile on, all times `scale`. `steps` is a multiple of four.
  __device__ __forceinline__ void run_forward(float (&h)[kStates], int steps, float scale) const {
#pragma unroll
    for (float& state : h) state *= scale;
    History::store(history, 0, {h[0], h[1], h[2], h[3]});
    Four dt = load_four(steps_at);
    Operands next = operands(Shape::kPlane, 0, 0);
#pragma unroll 2
    for (int t = 0; t < steps; t += 4) {
      const Operands now = next;
      const Four now_dt = dt;
      const int after = min(t + 4, steps - 4);
      dt = load_four(steps_at + after);  // in time for their use
      next = operands(Shape::kPlane, 0, after);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float x = now.x.value[j] * scale;
#pragma unroll
        for (int i = 0; i < kStates; ++i)
          h[i] = exp2_approx(now_dt.value[j] * A[i]) * h[i] + x * now.K[i].value[j];
        History::store(history, t + j + 1, {h[0], h[1], h[2], h[3]});
      }
    }
  }

  // Leaves the gradients of the states, times `scale`, in the place of the states, which are times
  // `state_scale`; and that of Δ by way of the decay.
  __device__ __forceinline__ void run_backward(int steps, float state_scale, float scale) {
    const float unscaled = inverse_power(scale), of_product = unscaled * inverse_power(state_scale);
    float* const dys = steps_at + 2 * Shape::kPlane;
#pragma unroll
    for (float& gradient : dh) gradient *= scale;
    // What a group of steps leaves in by_decay is summed up while the next one is computed.
    float by_decay[4], last_by_decay[4];
    const auto store = [&](int t, const float (&value)[4]) {
      // The sum has waited for all that read dy.
      dys[t + quarter] = sum_over_quarters(value, quarter) * of_product;
    };
    Four dt = load_four(steps_at + steps - 4);
#pragma unroll 1
    for (int t = steps - 4; t >= 0; t -= 4) {
      const Operands now = operands(2 * Shape::kPlane, Shape::kCoefficients, t);
      Four before[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) before[j] = History::load(history, t + j);
      if (t + 4 < steps) store(t + 4, last_by_decay);
#pragma unroll
      for (int j = 3; j >= 0; --j) {
        Four of_step;
        const float dy = now.x.value[j] * scale, dt_unscaled = dt.value[j] * of_product;
        by_decay[j] = 0;
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          of_step.value[i] = dh[i] + dy * now.K[i].value[j];
          dh[i] = exp2_approx(dt.value[j] * A[i]) * of_step.value[i];
          const float q = dh[i] * before[j].value[i];
          dA[i] += dt_unscaled * q;
          by_decay[j] += q * A[i];
        }
        History::store(history, t + j + 1, of_step);
        last_by_decay[j] = by_decay[j];
      }
      dt = load_four(steps_at + max(t - 4, 0));
    }
    store(0, by_decay);
#pragma unroll
    for (float& gradient : dh) gradient *= unscaled;
  }

 private:
  // Four steps of a plane and of the states' coefficients.
  struct Operands {
    Four x, K[kStates];
  };
  __device__ __forceinline__ Operands operands(int plane, int coefficients, int t) const {
    Operands of;
    of.x = load_four(steps_at + plane + t);
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      of.K[i] = load_four(coefficients_at + coefficients + i * Shape::kRow + t);
    return of;
  }
};

}  // namespace ssmcore::cuda
