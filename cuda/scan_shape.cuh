// How the kernel of selective_scan_varying_fwd.cu cuts its work, and what its stages share.
#pragma once

#include <type_traits>

#include "scan_row.cuh"

namespace ssmcore::cuda {

inline constexpr int kScanThreads = 128, kStagingThreads = 128;

// All threads of a block, which come here from two places: what stages and what runs the
// recurrence.
__device__ __forceinline__ void scan_barrier() {
  asm volatile("barrier.cta.sync 1, %0;" ::"n"(kScanThreads + kStagingThreads) : "memory");
}
// Whether any of them brought a true `value`.
__device__ __forceinline__ bool scan_barrier_or(bool value) {
  int any;
  asm volatile(
      "{ .reg .pred mine, any; setp.ne.s32 mine, %1, 0; "
      "barrier.cta.red.or.pred any, 1, %2, mine; selp.s32 %0, 1, 0, any; }"
      : "=r"(any)
      : "r"(static_cast<int>(value)), "n"(kScanThreads + kStagingThreads)
      : "memory");
  return any != 0;
}

// How a block of the scan shares its work (selective_scan_varying_fwd.cu).
template <int states, int lanes, int block_l, int min_blocks>
struct ScanShape {
  static constexpr int kStates = states, kLanes = lanes, kBlockL = block_l;
  static constexpr int kMinBlocks = min_blocks;  // on a multiprocessor
  static constexpr int kBlockD = kScanThreads / kLanes;
  static constexpr int kDstate = kStates * kLanes;  // at most

  // Floats in shared memory. The paddings keep threads that read fours together in different banks.
  static constexpr int kRow = kBlockL + 4;
  static constexpr int kParts = kLanes <= 2 ? 2 : kLanes + 2;
  static constexpr int kChannelRows = kParts * kRow + 4;
  static constexpr int kLaneRows = kStates * kRow + (kStates % 2 == 0 ? 4 : 0);
  static constexpr int kStage = kBlockD * kChannelRows + 2 * kLanes * kLaneRows;

  // Row `r` of Δ (part 0) and Δu (part 1) in a stage, and of what each lane adds to y: in the place
  // of these, or after them.
  __device__ static float* cells(float* stage, int part, int r) {
    return stage + r * kChannelRows + part * kRow;
  }
  static constexpr bool kInPlace = kLanes <= 2;
  __device__ static int part_of_lane(int lane) { return kInPlace ? 1 - lane : 2 + lane; }
  // Rows of B (0) or C (1) of a lane: its states are lane, lane + kLanes, …
  __device__ static float* coefficients(float* stage, int which, int lane) {
    return stage + kBlockD * kChannelRows + (which * kLanes + lane) * kLaneRows;
  }
};

// Cuts a row into tiles, none of which reaches over the end of a chunk.
struct Tiles {
  int64_t row_left, chunk_left, chunk_size;

  // Steps of the next tile; 0 after the last.
  template <int kBlockL>
  __device__ __forceinline__ int next() {
    if (chunk_left == 0) chunk_left = min(chunk_size, row_left);
    const int steps = static_cast<int>(min(int64_t{kBlockL}, chunk_left));
    chunk_left -= steps;
    row_left -= steps;
    return steps;
  }
};

struct Four {
  float value[4];
};

__device__ __forceinline__ Four load_four(const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  return {v.x, v.y, v.z, v.w};
}

__device__ __forceinline__ void store_four(float* to, const Four& four) {
  *reinterpret_cast<float4*>(to) =
      make_float4(four.value[0], four.value[1], four.value[2], four.value[3]);
}

// A row may be cut into parts of equal length (but for the last) that run side by side.
struct ScanParts {
  int64_t count = 1, length = 0;
  // (count - 1, rows, channels, dstate): by how much a part lets the states at its beginning decay,
  // and what it adds to them.
  float2* states = nullptr;
};

// What a block works on.
struct ScanBlock {
  const SelectiveScanFwdParams& p;
  const ScanParts& parts;
  int64_t part, row_index;
  ScanRow row;  // only its steps of this part
  int64_t head, first_d;
  int channels;
  bool along_steps;  // how its pieces lie

  __device__ Tiles tiles() const {
    const int64_t length = row.end - row.begin;
    return {length, 0, p.chunk_states.data ? p.chunk_size : length};
  }

  __device__ bool is_last_part() const { return part == parts.count - 1; }
  __device__ float2* part_state(int64_t part, int d, int n) const {
    const int64_t channel = head * p.headdim + first_d + d;
    return parts.states +
           ((part * p.rows + row_index) * p.nheads * p.headdim + channel) * p.dstate + n;
  }

  // The channel, counted from first_d, that row `r` of a stage holds. Those of a pair are half the
  // rows apart.
  template <int kBlockD>
  __device__ int channel_of(int r) const {
    return along_steps ? r : 2 * (r % (kBlockD / 2)) + r / (kBlockD / 2);
  }

  // At row `r` and step t of an operand (batch, .., rows, steps).
  template <typename Cursor>
  __device__ Cursor cursor(const Strided<4>& operand, int64_t at, int64_t r, int64_t t) const {
    using T = std::remove_pointer_t<decltype(Cursor::at)>;
    return {static_cast<T*>(operand.data) + row.batch * operand.stride[0] + at * operand.stride[1] +
                r * operand.stride[2] + (row.begin + t) * operand.stride[3],
            operand.stride[2], operand.stride[3]};
  }
};

__device__ __forceinline__ float float_at(const Strided<2>& operand, int64_t head, int64_t d) {
  return static_cast<const float*>(operand.data)[head * operand.stride[0] + d * operand.stride[1]];
}

}  // namespace ssmcore::cuda
