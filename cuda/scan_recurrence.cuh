// The middle stage of selective_scan_varying_fwd.cu: the recurrence, serially in time.
#pragma once

#include "device/math.cuh"
#include "scan_shape.cuh"

namespace ssmcore::cuda {

template <typename Shape>
struct ScanRecurrence {
  static constexpr int kChannels = Shape::kChannels, kStates = Shape::kStates;

  const ScanBlock& block;
  const SelectiveScanFwdParams& p;
  float* shared;
  const int lane, group;
  float A[kChannels][kStates], h[kChannels][kStates], delta_sum[kChannels], lost[kChannels];

  __device__ ScanRecurrence(const ScanBlock& block, float* shared, int thread)
      : block(block),
        p(block.p),
        shared(shared),
        lane(thread % Shape::kLanes),
        group(thread / Shape::kLanes) {}

  __device__ int row(int k) const { return group + k * (Shape::kBlockD / kChannels); }

  // Calls body(d, n, k, s) for the channels and states of this thread that exist.
  template <typename Body>
  __device__ __forceinline__ void for_each_state(const Body& body) const {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const int d = block.channel_of<Shape::kBlockD>(row(k));
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        const int n = lane + s * Shape::kLanes;
        if (d < block.channels && n < p.dstate) body(block.first_d + d, n, k, s);
      }
    }
  }

  __device__ __forceinline__ void store_states(float* to, int64_t stride_d,
                                               int64_t stride_n) const {
    for_each_state(
        [&](int64_t d, int n, int k, int s) { to[d * stride_d + n * stride_n] = h[k][s]; });
  }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      delta_sum[k] = lost[k] = 0;
#pragma unroll
      for (int s = 0; s < kStates; ++s) A[k][s] = h[k][s] = 0;
    }
    const float* from = static_cast<const float*>(p.A.data) + block.head * p.A.stride[0];
    for_each_state([&](int64_t d, int n, int k, int s) {
      A[k][s] = from[d * p.A.stride[1] + n * p.A.stride[2]] * kLog2e;
    });
    if (!p.initial_state.data || block.row.slot < 0) return;
    from = static_cast<const float*>(p.initial_state.data) +
           block.row.slot * p.initial_state.stride[0] + block.head * p.initial_state.stride[1];
    for_each_state([&](int64_t d, int n, int k, int s) {
      h[k][s] = from[d * p.initial_state.stride[2] + n * p.initial_state.stride[3]];
    });
  }

  __device__ __forceinline__ void run() {
    load();
    int64_t chunk = first_chunk();
    Tiles tiles = block.tiles();
    int steps = tiles.next<Shape::kBlockL>();
    if (steps > 0) __syncthreads();
    for (bool odd = false; steps > 0; odd = !odd) {
      float* stage = shared + (odd ? Shape::kStage : 0);
      if (p.delta_sum.data) add_deltas(stage, steps);
      advance(stage, steps);
      if (p.chunk_states.data && tiles.chunk_left == 0 && chunk < p.chunks) {
        const Strided<5>& to = p.chunk_states;
        store_states(static_cast<float*>(to.data) + block.row.batch * to.stride[0] +
                         chunk * to.stride[1] + block.head * to.stride[2],
                     to.stride[3], to.stride[4]);
        ++chunk;
      }
      steps = tiles.next<Shape::kBlockL>();
      __syncthreads();
    }
    if (p.last_state.data && block.row.slot >= 0) {
      const Strided<4>& to = p.last_state;
      store_states(
          static_cast<float*>(to.data) + block.row.slot * to.stride[0] + block.head * to.stride[1],
          to.stride[2], to.stride[3]);
    }
    if (p.delta_sum.data && lane == 0) {
      const Strided<3>& to = p.delta_sum;
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const int d = block.channel_of<Shape::kBlockD>(row(k));
        if (d < block.channels)
          static_cast<float*>(to.data)[block.row_index * to.stride[0] + block.head * to.stride[1] +
                                       (block.first_d + d) * to.stride[2]] = delta_sum[k];
      }
    }
  }

  // The row's first entry in chunk_states: packed rows follow one another. Each lane of a warp
  // counts for some of the rows before.
  __device__ int64_t first_chunk() const {
    if (!p.chunk_states.data || !p.cu_seqlens.data) return 0;
    int64_t chunks = 0;
    for (int64_t i = threadIdx.x % 32; i < block.row_index; i += 32) {
      const int64_t length = index_at(p.cu_seqlens, i + 1) - index_at(p.cu_seqlens, i);
      if (length > 0) chunks += (length - 1) / p.chunk_size + 1;
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) chunks += __shfl_xor_sync(~0u, chunks, lanes);
    return chunks;
  }

  // What four steps need.
  struct Steps {
    Four dt[kChannels], dt_u[kChannels];
  };
  __device__ __forceinline__ void load_steps(float* stage, int t, Steps& steps) const {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      steps.dt[k] = load_four(Shape::cells(stage, 0, row(k)) + t);
      steps.dt_u[k] = load_four(Shape::cells(stage, 1, row(k)) + t);
    }
  }

  __device__ __forceinline__ void advance(float* stage, int steps) {
    const float* B = Shape::coefficients(stage, 0, lane);
    const float* C = Shape::coefficients(stage, 1, lane);
    Steps now, next;
    load_steps(stage, 0, next);
    constexpr bool kAhead = kStates <= 2;  // B and C, too, are read ahead
    Four B_ahead[kAhead ? kStates : 1], C_ahead[kAhead ? kStates : 1];
    if (kAhead) {
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        B_ahead[s] = load_four(B + s * Shape::kRow);
        C_ahead[s] = load_four(C + s * Shape::kRow);
      }
    }
#pragma unroll(kChannels* kStates <= 4 ? 4 : 1)
    for (int t = 0; t < steps; t += 4) {
      now = next;
      load_steps(stage, t + 4, next);  // after the last: the unused end of the row
      Four y[kChannels] = {};
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        Four B_s, C_s;
        if (kAhead) {
          B_s = B_ahead[s];
          C_s = C_ahead[s];
          B_ahead[s] = load_four(B + s * Shape::kRow + t + 4);
          C_ahead[s] = load_four(C + s * Shape::kRow + t + 4);
        } else {
          B_s = load_four(B + s * Shape::kRow + t);
          C_s = load_four(C + s * Shape::kRow + t);
        }
#pragma unroll
        for (int k = 0; k < kChannels; ++k)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float a = exp2_approx(now.dt[k].value[i] * A[k][s]);
            h[k][s] = a * h[k][s] + now.dt_u[k].value[i] * B_s.value[i];
            y[k].value[i] += C_s.value[i] * h[k][s];
          }
      }
      if (Shape::kInPlace && Shape::kLanes > 1)
        __syncwarp();  // all lanes have read what is now overwritten
#pragma unroll
      for (int k = 0; k < kChannels; ++k)
        store_four(Shape::cells(stage, Shape::part_of_lane(lane), row(k)) + t, y[k]);
    }
  }

  // Kahan's summation: a million tiles lose no more than one.
  __device__ __forceinline__ void add_deltas(float* stage, int steps) {
    for (int t = 0; t < steps; t += 4) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const Four dt = load_four(Shape::cells(stage, 0, row(k)) + t);
        const float sum = (dt.value[0] + dt.value[1]) + (dt.value[2] + dt.value[3]);
        const float added = sum - lost[k], after = delta_sum[k] + added;
        lost[k] = (after - delta_sum[k]) - added;
        delta_sum[k] = after;
      }
    }
    __syncwarp();  // before it is overwritten
  }
};

}  // namespace ssmcore::cuda
