// The middle stage of selective_scan_varying_fwd.cu: the recurrence, serially in time.
#pragma once

#include "device/math.cuh"
#include "scan_shape.cuh"

namespace ssmcore::cuda {

// One thread: some states of one channel.
template <typename Shape>
struct ScanRecurrence {
  static constexpr int kStates = Shape::kStates;

  const ScanBlock& block;
  const SelectiveScanFwdParams& p;
  float* const shared;
  const int lane, row, d;  // row of a stage, and channel
  float A[kStates], h[kStates];

  __device__ ScanRecurrence(const ScanBlock& block, float* shared, int thread)
      : block(block),
        p(block.p),
        shared(shared),
        lane(thread % Shape::kLanes),
        row(thread / Shape::kLanes),
        d(block.channel_of<Shape::kBlockD>(row)) {
    const float* from = static_cast<const float*>(p.A.data) + block.head * p.A.stride[0] +
                        (block.first_d + d) * p.A.stride[1];
#pragma unroll
    for (int s = 0; s < kStates; ++s)
      A[s] = exists(s) ? from[state(s) * p.A.stride[2]] * kLog2e : 0.0f;
  }

  __device__ int state(int s) const { return lane + s * Shape::kLanes; }
  __device__ bool exists(int s) const { return d < block.channels && state(s) < p.dstate; }

  // The outputs of one part of a row.
  __device__ __forceinline__ void run() {
    load_initial_state();
    float delta_sum = 0, lost = 0;
    int64_t chunk = p.chunk_states.data ? first_chunk() : 0;
    Tiles tiles = block.tiles();
    int steps = tiles.next<Shape::kBlockL>();
    if (steps > 0) scan_barrier();
    for (bool odd = false; steps > 0; odd = !odd) {
      float* stage = shared + (odd ? Shape::kStage : 0);
      if (p.delta_sum.data) add_deltas(stage, steps, &delta_sum, &lost);
      advance<true>(stage, steps);
      if (p.chunk_states.data && tiles.chunk_left == 0 && chunk < p.chunks) {
        const Strided<5>& to = p.chunk_states;
        store_states(static_cast<float*>(to.data) + block.row.batch * to.stride[0] +
                         chunk * to.stride[1] + block.head * to.stride[2],
                     to.stride[3], to.stride[4]);
        ++chunk;
      }
      steps = tiles.next<Shape::kBlockL>();
      scan_barrier();
    }
    if (p.last_state.data && block.row.slot >= 0 && block.is_last_part()) {
      const Strided<4>& to = p.last_state;
      store_states(
          static_cast<float*>(to.data) + block.row.slot * to.stride[0] + block.head * to.stride[1],
          to.stride[2], to.stride[3]);
    }
    if (p.delta_sum.data && lane == 0 && d < block.channels) {
      const Strided<3>& to = p.delta_sum;
      static_cast<float*>(to.data)[block.row_index * to.stride[0] + block.head * to.stride[1] +
                                   (block.first_d + d) * to.stride[2]] = delta_sum;
    }
  }

  // What a part contributes to the states at its end, and by how much it lets those at its
  // beginning decay. Tiles come last first: once the decay from a tile's end to the part's is 0 for
  // every state of the block, those before it do not count.
  __device__ __forceinline__ void run_states(int tiles) {
    float sum[kStates], decay[kStates], later = 0;  // later: Σ Δ of the tiles done
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      sum[s] = 0;
      decay[s] = 1;
    }
    scan_barrier_or(true);
    for (int tile = 0; tile < tiles; ++tile) {
      float* stage = shared + tile % 2 * Shape::kStage;
#pragma unroll
      for (int s = 0; s < kStates; ++s) h[s] = 0;
      later += advance<false>(stage, Shape::kBlockL);
      bool counts = false;
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        sum[s] += decay[s] * h[s];
        decay[s] = exp2_approx(later * A[s]);
        counts = counts || (exists(s) && decay[s] != 0);
      }
      if (tile + 1 < tiles && !scan_barrier_or(counts)) break;
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s)
      if (exists(s)) *block.part_state(block.part, d, state(s)) = make_float2(decay[s], sum[s]);
  }

 private:
  __device__ __forceinline__ void load_initial_state() {
    const Strided<4>& from = p.initial_state;
    const bool given = from.data && block.row.slot >= 0;
    const float* state_of_d =
        static_cast<const float*>(from.data) +
        (given ? block.row.slot * from.stride[0] + block.head * from.stride[1] +
                     (block.first_d + d) * from.stride[2]
               : 0);
#pragma unroll
    for (int s = 0; s < kStates; ++s)
      h[s] = given && exists(s) ? state_of_d[state(s) * from.stride[3]] : 0.0f;
    for (int part = 0; part < block.part; ++part)
#pragma unroll
      for (int s = 0; s < kStates; ++s)
        if (exists(s)) {
          const float2 decay_sum = *block.part_state(part, d, state(s));
          h[s] = decay_sum.x * h[s] + decay_sum.y;
        }
  }

  __device__ __forceinline__ void store_states(float* to, int64_t stride_d,
                                               int64_t stride_n) const {
#pragma unroll
    for (int s = 0; s < kStates; ++s)
      if (exists(s)) to[(block.first_d + d) * stride_d + state(s) * stride_n] = h[s];
  }

  // The row's first entry in chunk_states. Packed rows follow one another: each lane of a warp
  // counts for some of the rows before.
  __device__ int64_t first_chunk() const {
    if (!p.cu_seqlens.data) return 0;
    int64_t chunks = 0;
    for (int64_t i = threadIdx.x % 32; i < block.row_index; i += 32) {
      const int64_t length = index_at(p.cu_seqlens, i + 1) - index_at(p.cu_seqlens, i);
      if (length > 0) chunks += (length - 1) / p.chunk_size + 1;
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) chunks += __shfl_xor_sync(~0u, chunks, lanes);
    return chunks;
  }

  // Advances the states over a tile. Leaves y in shared memory (kOutputs), or returns Σ Δ.
  template <bool kOutputs>
  __device__ __forceinline__ float advance(float* stage, int steps) {
    constexpr bool kAhead = kStates <= 2;  // B and C, too, are read four steps ahead
    float* const cells = Shape::cells(stage, 0, row);
    float* const y_cells = Shape::cells(stage, Shape::part_of_lane(lane), row);
    const float* const B = Shape::coefficients(stage, 0, lane);
    const float* const C = Shape::coefficients(stage, 1, lane);
    Four dt_next = load_four(cells), dt_u_next = load_four(cells + Shape::kRow);
    Four B_next[kAhead ? kStates : 1], C_next[kAhead ? kStates : 1];
    const auto load_coefficients = [&](int t) {
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        B_next[s] = load_four(B + s * Shape::kRow + t);
        if (kOutputs) C_next[s] = load_four(C + s * Shape::kRow + t);
      }
    };
    if constexpr (kAhead) load_coefficients(0);
    float delta_sum = 0;
#pragma unroll(kStates <= 4 ? 4 : 1)
    for (int t = 0; t < steps; t += 4) {
      const Four dt = dt_next, dt_u = dt_u_next;
      dt_next = load_four(cells + t + 4);  // after the last: the unused end of the row
      dt_u_next = load_four(cells + Shape::kRow + t + 4);
      Four B_now[kAhead ? kStates : 1], C_now[kAhead ? kStates : 1];
      if constexpr (kAhead) {
#pragma unroll
        for (int s = 0; s < kStates; ++s) {
          B_now[s] = B_next[s];
          C_now[s] = C_next[s];
        }
        load_coefficients(t + 4);
      }
      Four y = {};
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        Four B_s, C_s;
        if constexpr (kAhead) {
          B_s = B_now[s];
          C_s = C_now[s];
        } else {
          B_s = load_four(B + s * Shape::kRow + t);
          if (kOutputs) C_s = load_four(C + s * Shape::kRow + t);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          h[s] = exp2_approx(dt.value[i] * A[s]) * h[s] + dt_u.value[i] * B_s.value[i];
          if (kOutputs) y.value[i] += C_s.value[i] * h[s];
        }
      }
      if constexpr (kOutputs) {
        if (Shape::kInPlace && Shape::kLanes > 1)
          __syncwarp();  // all lanes have read what is now overwritten
        store_four(y_cells + t, y);
      } else {
        delta_sum += (dt.value[0] + dt.value[1]) + (dt.value[2] + dt.value[3]);
      }
    }
    return delta_sum;
  }

  // Kahan's summation: a million tiles lose no more than one.
  __device__ __forceinline__ void add_deltas(float* stage, int steps, float* sum,
                                             float* lost) const {
    for (int t = 0; t < steps; t += 4) {
      const Four dt = load_four(Shape::cells(stage, 0, row) + t);
      const float added = ((dt.value[0] + dt.value[1]) + (dt.value[2] + dt.value[3])) - *lost;
      const float after = *sum + added;
      *lost = (after - *sum) - added;
      *sum = after;
    }
    __syncwarp();  // before it is overwritten
  }
};

}  // namespace ssmcore::cuda
