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

  // The sums of two states, `first_state()` and the next, in step lane % 4.
  __device__ __forceinline__ float2 sums(int lane) const {
    const bool second = lane & 4;  // half of the channels: keeps the upper two states
    const auto exchange = [second](float keep0, float keep1, float send0, float send1) {
      return (second ? keep1 : keep0) + __shfl_xor_sync(~0u, second ? send1 : send0, 4);
    };
    return {exchange(low_[0], high_[1], high_[0], low_[1]),
            exchange(low_[2], high_[3], high_[2], low_[3])};
  }
  __device__ static int first_state(int lane) { return lane / 8 * 4 + (lane & 4) / 2; }

 private:
  float low_[4] = {}, high_[4] = {};  // states 0 and 1, 2 and 3
};

// Keeps the compiler from computing a value again wherever it is used.
__device__ __forceinline__ int kept(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// One thread of the main pass.
template <typename T, bool kAlongSteps>
struct ScanBwdRecurrence : ScanBwdStates<kAlongSteps> {
  using States = ScanBwdStates<kAlongSteps>;
  using Shape = ScanBwdShape;
  using States::A, States::lane, States::quarter, States::row, States::warp;
  static constexpr int kStates = Shape::kStates, kSpan = Shape::kSpan;

  const ScanBwdMemory memory;
  // Where in shared memory the thread's are: its channel's steps, its states' coefficients, its
  // states at the beginning of a span, and the sums that it leaves in their place.
  const int row_at, coefficients_at, sums_at;
  float dh[kStates];  // of the states before the steps done, from these
  float dA[kStates] = {};

  explicit __device__ ScanBwdRecurrence(const ScanBwdBlock& block)
      : States(block),
        memory(block.memory),
        row_at(kept(memory.offset(memory.delta(row)))),
        coefficients_at(kept(memory.offset(memory.coefficients(0, this->first_n)))),
        sums_at(kept(memory.offset(memory.y(row, 0)) + quarter)) {}

  __device__ int start_at() const { return sums_at + (4 * Shape::kWarpD - 1) * quarter; }

  // Leaves the states before each span, h being those before the tile.
  __device__ __forceinline__ void find_starts(float (&h)[kStates], int spans) const {
    float* start = memory.at(start_at());
    const float* steps = memory.at(row_at);
    const float* coefficients = memory.at(coefficients_at);
#pragma unroll 1
    for (int span = 0;;) {
      store_four(start, {h[0], h[1], h[2], h[3]});
      if (++span == spans) break;
#pragma unroll
      for (int t = 0; t < kSpan; t += 4) {
        const Four dt = load_four(steps + t), dt_u = load_four(steps + Shape::kPlane + t);
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          const Four B = load_four(coefficients + i * Shape::kRow + t);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            h[i] = exp2_approx(dt.value[j] * A[i]) * h[i] + dt_u.value[j] * B.value[j];
        }
      }
      start += Shape::kSpanSlots;
      steps += kSpan;
      coefficients += kSpan;
    }
  }

  // What a span adds to dB and dC, in fours of its steps.
  struct Products {
    float2 dB[kSpan / 4], dC[kSpan / 4];
  };

  // Goes over a span forward, and backward. Leaves y, and the gradients of Δu and of Δ by way of
  // the decay.
  __device__ __forceinline__ Products run_span(int span) {
    float* const steps = memory.at(row_at + span * kSpan);
    float* const own_step = steps + quarter;
    const float* const Bs = memory.at(coefficients_at + span * kSpan);
    const float* const Cs = Bs + Shape::kCoefficients;
    float* const sums = memory.at(sums_at + span * Shape::kSpanSlots);
    const Four start = load_four(memory.at(start_at() + span * Shape::kSpanSlots));
    __syncwarp();  // all have read what is now overwritten
    Products products;
    float h[kSpan + 1][kStates];  // before each step and after the last
    float decay[4][kStates];      // of the last steps; registers have no room for the first ones'
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[0][i] = start.value[i];
#pragma unroll
    for (int t = 0; t < kSpan; t += 4) {
      const Four dt = load_four(steps + t), dt_u = load_four(steps + Shape::kPlane + t);
      float y[4] = {};
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const Four B = load_four(Bs + i * Shape::kRow + t), C = load_four(Cs + i * Shape::kRow + t);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          decay[j][i] = exp2_approx(dt.value[j] * A[i]);
          h[t + j + 1][i] = decay[j][i] * h[t + j][i] + dt_u.value[j] * B.value[j];
          y[j] += C.value[j] * h[t + j + 1][i];
        }
      }
      const float dy = prepare_factor<T>(own_step[2 * Shape::kPlane + t]);
      ChannelSums<T> dC;
      dC.template add<0>(h[t + 1], h[t + 2], dy, quarter);
      dC.template add<2>(h[t + 3], h[t + 4], dy, quarter);
      products.dC[t / 4] = dC.sums(lane);
      sums[t * Shape::kWarpD] = sum_over_quarters(y, quarter);
    }
#pragma unroll
    for (int t = kSpan - 4; t >= 0; t -= 4) {
      const Four dt = load_four(steps + t), dy = load_four(steps + 2 * Shape::kPlane + t);
      float of_step[4][kStates], dx[4] = {}, by_decay[4] = {};
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const Four B = load_four(Bs + i * Shape::kRow + t), C = load_four(Cs + i * Shape::kRow + t);
#pragma unroll
        for (int j = 3; j >= 0; --j) {
          of_step[j][i] = dh[i] + dy.value[j] * C.value[j];
          dx[j] += of_step[j][i] * B.value[j];
          if (t < kSpan - 4) decay[j][i] = exp2_approx(dt.value[j] * A[i]);
          dh[i] = decay[j][i] * of_step[j][i];
          const float q = dh[i] * h[t + j][i];
          dA[i] += dt.value[j] * q;
          by_decay[j] += q * A[i];
        }
      }
      float* const dt_u = own_step + Shape::kPlane + t;
      const float factor = prepare_factor<T>(*dt_u);
      ChannelSums<T> dB;
      dB.template add<0>(of_step[0], of_step[1], factor, quarter);
      dB.template add<2>(of_step[2], of_step[3], factor, quarter);
      products.dB[t / 4] = dB.sums(lane);
      sums[Shape::kSpanSlots / 2 + t * Shape::kWarpD] = sum_over_quarters(dx, quarter);
      *dt_u = sum_over_quarters(by_decay, quarter);
    }
    return products;
  }

  // Adds a span's products to those of the warps before this one; the last warp stores them, the
  // first `steps` of them, to (steps, 2, kDstate). So sums are in a fixed order, and no warp waits
  // for one after it.
  __device__ __forceinline__ void add_products(Products& products, int span, unsigned phases,
                                               float* to, int steps) const {
    float* const sums = memory.products(span, lane);
    if (warp > 0) {
      memory.added(span, warp - 1)->wait(phases >> span & 1);
      const Four dB = load_four(sums), dC = load_four(sums + 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        products.dB[i].x += dB.value[2 * i];
        products.dB[i].y += dB.value[2 * i + 1];
        products.dC[i].x += dC.value[2 * i];
        products.dC[i].y += dC.value[2 * i + 1];
      }
    }
    if (warp < Shape::kWarps - 1) {
      store_four(sums, {products.dB[0].x, products.dB[0].y, products.dB[1].x, products.dB[1].y});
      store_four(sums + 4,
                 {products.dC[0].x, products.dC[0].y, products.dC[1].x, products.dC[1].y});
      memory.added(span, warp)->arrive();
      return;
    }
#pragma unroll
    for (int i = 0; i < kSpan / 4; ++i) {
      const int step = 4 * i + lane % 4;
      if (step >= steps) break;
      float* const at = to + step * 2 * Shape::kDstate + ChannelSums<T>::first_state(lane);
      *reinterpret_cast<float2*>(at) = products.dB[i];
      *reinterpret_cast<float2*>(at + Shape::kDstate) = products.dC[i];
    }
  }
};

}  // namespace ssmcore::cuda
