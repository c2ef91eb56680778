// The middle stage of scan_kernel.cuh: the recurrence, serially in time.
#pragma once

#include "device/math.cuh"
#include "scan_shape.cuh"

namespace ssmcore::cuda {

// Σ Δ by Kahan's summation: a million tiles lose no more than one.
struct DeltaSum {
  float value = 0, lost = 0;

  __device__ __forceinline__ void add(float more) {
    const float added = more - lost, after = value + added;
    lost = isinf(after) ? 0.0f : (after - value) - added;
    value = after;
  }
};

// One thread: some states of some channels.
template <typename Shape, bool kAlongSteps>
struct ScanRecurrence {
  static constexpr int kStates = Shape::kStates, kChannels = Shape::kChannels;

  const ScanBlock& block;
  const SelectiveScanFwdParams& p;
  float* const shared;
  const int lane, group;
  float A[kChannels][kStates], h[kChannels][kStates];

  __device__ ScanRecurrence(const ScanBlock& block, float* shared, int thread)
      : block(block),
        p(block.p),
        shared(shared),
        lane(thread % Shape::kLanes),
        group(thread / Shape::kLanes) {
    const float* from = static_cast<const float*>(p.A.data) + block.head * p.A.stride[0];
    for_each_state([&](int c, int s) {
      A[c][s] =
          exists(c, s)
              ? from[(block.first_d + channel(c)) * p.A.stride[1] + state(s) * p.A.stride[2]] *
                    kLog2e
              : 0.0f;
    });
  }

  // Row of a stage, and channel of the block.
  __device__ int row(int c) const { return group + c * Shape::kGroups; }
  __device__ int channel(int c) const { return Shape::template channel_of<kAlongSteps>(row(c)); }
  __device__ int state(int s) const { return lane + s * Shape::kLanes; }
  __device__ bool exists(int c, int s) const {
    return channel(c) < block.channels && state(s) < static_cast<int>(p.dstate);
  }
  template <typename Function>
  __device__ __forceinline__ static void for_each_state(const Function& function) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
#pragma unroll
      for (int s = 0; s < kStates; ++s) function(c, s);
  }

  // The outputs of one part of a row.
  __device__ __forceinline__ void run() {
    load_initial_state();
    DeltaSum sum[kChannels] = {};
    int64_t chunk = p.chunk_states.data ? first_chunk() : 0;
    Tiles tiles = block.tiles();
    int steps = tiles.next<Shape::kBlockL>();
    if (steps > 0) scan_barrier<Shape::kThreads>();
    for (bool odd = false; steps > 0; odd = !odd) {
      float* stage = shared + (odd ? Shape::kStage : 0);
      if (p.delta_sum.data) add_deltas(stage, steps, sum);
      advance<true>(stage, steps);
      if (p.chunk_states.data && tiles.chunk_left == 0 && chunk < p.chunks) {
        const Strided<5>& to = p.chunk_states;
        store_states(static_cast<float*>(to.data) + block.row.batch * to.stride[0] +
                         chunk * to.stride[1] + block.head * to.stride[2],
                     to.stride[3], to.stride[4]);
        ++chunk;
      }
      steps = tiles.next<Shape::kBlockL>();
      scan_barrier<Shape::kThreads>();
    }
    if (p.last_state.data && block.row.slot >= 0 && block.is_last_part()) {
      const Strided<4>& to = p.last_state;
      store_states(
          static_cast<float*>(to.data) + block.row.slot * to.stride[0] + block.head * to.stride[1],
          to.stride[2], to.stride[3]);
    }
    if (p.delta_sum.data && lane == 0 && block.is_last_part()) {
      add_parts(sum);
      const Strided<3>& to = p.delta_sum;
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        if (channel(c) < block.channels)
          static_cast<float*>(to.data)[block.row_index * to.stride[0] + block.head * to.stride[1] +
                                       (block.first_d + channel(c)) * to.stride[2]] = sum[c].value;
    }
  }

  // What a part contributes to the states at its end, and by how much it lets those at its
  // beginning decay. Tiles come last first: once the decay from a tile's end to the part's is 0 for
  // every state of the block, those before it count only for Σ Δ.
  __device__ __forceinline__ void run_states(int tiles) {
    float sum[kChannels][kStates], decay[kChannels][kStates];
    DeltaSum later[kChannels] = {};  // of the tiles done
    for_each_state([&](int c, int s) {
      sum[c][s] = 0;
      decay[c][s] = 1;
    });
    scan_barrier_or<Shape::kThreads>(true);
    for (int tile = 0; tile < tiles; ++tile) {
      for_each_state([&](int c, int s) { h[c][s] = 0; });
      float added[kChannels] = {};
      advance<false>(shared + tile % 2 * Shape::kStage, Shape::kBlockL, added);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) later[c].add(added[c]);
      float left = 0;  // how much of what is before this tile
      for_each_state([&](int c, int s) {
        sum[c][s] += decay[c][s] * h[c][s];
        decay[c][s] = exp2_approx(later[c].value * A[c][s]);
        left += exists(c, s) ? decay[c][s] : 0.0f;
      });
      if (block.parts.delta_sums) left = 1;
      if (tile + 1 < tiles && !scan_barrier_or<Shape::kThreads>(left != 0)) break;
    }
    for_each_state([&](int c, int s) {
      if (exists(c, s))
        *block.part_state(block.part, channel(c), state(s)) = make_float2(decay[c][s], sum[c][s]);
    });
    if (block.parts.delta_sums && lane == 0) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        if (channel(c) < block.channels)
          block.parts.delta_sums[block.part_channel(block.part, channel(c))] = later[c].value;
    }
  }

 private:
  __device__ __forceinline__ void load_initial_state() {
    const Strided<4>& from = p.initial_state;
    const bool given = from.data && block.row.slot >= 0;
    const float* states =
        static_cast<const float*>(from.data) +
        (given ? block.row.slot * from.stride[0] + block.head * from.stride[1] : 0);
    for_each_state([&](int c, int s) {
      h[c][s] =
          given && exists(c, s)
              ? states[(block.first_d + channel(c)) * from.stride[2] + state(s) * from.stride[3]]
              : 0.0f;
    });
    for (int part = 0; part < block.part; ++part)
      for_each_state([&](int c, int s) {
        if (exists(c, s)) {
          const float2 decay_sum = *block.part_state(part, channel(c), state(s));
          h[c][s] = decay_sum.x * h[c][s] + decay_sum.y;
        }
      });
  }

  __device__ __forceinline__ void store_states(float* to, int64_t stride_d,
                                               int64_t stride_n) const {
    for_each_state([&](int c, int s) {
      if (exists(c, s)) to[(block.first_d + channel(c)) * stride_d + state(s) * stride_n] = h[c][s];
    });
  }

  // The first entry in chunk_states.
  __device__ int64_t first_chunk() const {
    return block.parts.count > 1 ? block.row.begin / p.chunk_size
                                 : first_chunk_of_row(p, block.row_index);
  }

  // Four steps of a tile, as they lie in shared memory.
  struct Deltas {
    Four dt[kChannels], dt_u[kChannels];
  };
  struct Coefficients {
    Four B, C;
  };
  __device__ __forceinline__ Deltas load_deltas(const float* stage, int t) const {
    Deltas deltas;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      deltas.dt[c] = load_four(Shape::cells(stage, 0, row(c)) + t);
      deltas.dt_u[c] = load_four(Shape::cells(stage, 1, row(c)) + t);
    }
    return deltas;
  }
  template <bool kOutputs>
  __device__ __forceinline__ Coefficients load_coefficients(const float* stage, int s,
                                                            int t) const {
    Coefficients coefficients;
    coefficients.B = load_four(Shape::coefficients(stage, 0, state(s)) + t);
    if (kOutputs) coefficients.C = load_four(Shape::coefficients(stage, 1, state(s)) + t);
    return coefficients;
  }

  // Advances the states over a tile. Leaves y in shared memory (kOutputs), or adds Σ Δ to `added`.
  template <bool kOutputs>
  __device__ __forceinline__ void advance(float* stage, int steps, float* added = nullptr) {
    // The next four steps are read before y of these is stored; so are B and C of few states.
    constexpr bool kAhead = kStates * kChannels <= 4;
    constexpr int kFours = kAhead ? 4 : kStates * kChannels <= 16 ? 2 : 1;
    static_assert(Shape::kBlockL % (4 * kFours) == 0);
    Deltas next = load_deltas(stage, 0);
    Coefficients next_coefficients[kAhead ? kStates : 1];
    if constexpr (kAhead) {
#pragma unroll
      for (int s = 0; s < kStates; ++s)
        next_coefficients[s] = load_coefficients<kOutputs>(stage, s, 0);
    }
#pragma unroll 1
    for (int first = 0; first < steps; first += 4 * kFours)
#pragma unroll
      for (int four = 0; four < kFours; ++four) {
        const int t = first + 4 * four;
        const Deltas deltas = next;
        next = load_deltas(stage, t + 4);  // after the last: the unused end of the row
        Four y[kChannels] = {};
#pragma unroll
        for (int s = 0; s < kStates; ++s) {
          Coefficients now;
          if constexpr (kAhead) {
            now = next_coefficients[s];
            next_coefficients[s] = load_coefficients<kOutputs>(stage, s, t + 4);
          } else {
            now = load_coefficients<kOutputs>(stage, s, t);
          }
#pragma unroll
          for (int c = 0; c < kChannels; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              h[c][s] = exp2_approx(deltas.dt[c].value[i] * A[c][s]) * h[c][s] +
                        deltas.dt_u[c].value[i] * now.B.value[i];
              if (kOutputs) y[c].value[i] += now.C.value[i] * h[c][s];
            }
        }
        if constexpr (kOutputs) store_y(stage, t, y);
        if constexpr (!kOutputs) {
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            added[c] += sum_of(deltas.dt[c]);
          }
        }
      }
  }

  __device__ __forceinline__ void store_y(float* stage, int t, const Four (&y)[kChannels]) const {
    if (Shape::kInPlace && Shape::kLanes > 1)
      __syncwarp();  // all lanes have read what is now overwritten
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if constexpr (Shape::kInPlace)
        store_four(Shape::cells(stage, Shape::y_part(lane), row(c)) + t, y[c]);
      else
        Shape::cells(stage, Shape::y_part(lane / 4), row(c))[t + lane % 4] = sum_over_four(y[c]);
    }
  }

  // The sum over four neighbouring lanes: of the first step in the first of them, and so on.
  __device__ __forceinline__ float sum_over_four(const Four& y) const {
    const bool upper = lane & 2, odd = lane & 1;
    const auto exchange = [](bool second, float a, float b, int lanes) {
      return (second ? b : a) + __shfl_xor_sync(~0u, second ? a : b, lanes);
    };
    const float first = exchange(upper, y.value[0], y.value[2], 2);
    return exchange(odd, first, exchange(upper, y.value[1], y.value[3], 2), 1);
  }

  __device__ __forceinline__ static float sum_of(const Four& four) {
    return (four.value[0] + four.value[1]) + (four.value[2] + four.value[3]);
  }
  __device__ __forceinline__ void add_deltas(const float* stage, int steps,
                                             DeltaSum (&sum)[kChannels]) const {
    for (int t = 0; t < steps; t += 4)
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        sum[c].add(sum_of(load_four(Shape::cells(stage, 0, row(c)) + t)));
    __syncwarp();  // before it is overwritten
  }
  __device__ __forceinline__ void add_parts(DeltaSum (&sum)[kChannels]) const {
    for (int part = 0; part < block.part; ++part)
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        if (channel(c) < block.channels)
          sum[c].add(block.parts.delta_sums[block.part_channel(part, channel(c))]);
  }
};

}  // namespace ssmcore::cuda
