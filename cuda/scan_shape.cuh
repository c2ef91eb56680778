// How scan_kernel.cuh cuts its work, and what its parts share.
#pragma once

#include <type_traits>

#include "scan_row.cuh"

namespace ssmcore::cuda {

// All kThreads of a block, which come here from two places: what stages and what runs the
// recurrence.
template <int kThreads>
__device__ __forceinline__ void scan_barrier() {
  asm volatile("barrier.cta.sync 1, %0;" ::"n"(kThreads) : "memory");
}
// Whether any of them brought a true `value`.
template <int kThreads>
__device__ __forceinline__ bool scan_barrier_or(bool value) {
  int any;
  asm volatile(
      "{ .reg .pred mine, any; setp.ne.s32 mine, %1, 0; "
      "barrier.cta.red.or.pred any, 1, %2, mine; selp.s32 %0, 1, 0, any; }"
      : "=r"(any)
      : "r"(static_cast<int>(value)), "n"(kThreads)
      : "memory");
  return any != 0;
}

// How a block of the scan shares its work (scan_kernel.cuh): a thread has `states` of the states of
// each of `channels` channels, and `lanes` threads have them all.
template <int states, int lanes, int channels, int block_l, int min_blocks, int staging_threads>
struct ScanShape {
  static constexpr int kStates = states, kLanes = lanes, kChannels = channels, kBlockL = block_l;
  static constexpr int kMinBlocks = min_blocks;  // on a multiprocessor
  static constexpr int kScanThreads = 128, kStagingThreads = staging_threads;
  static constexpr int kThreads = kScanThreads + kStagingThreads;
  static constexpr int kGroups = kScanThreads / kLanes;  // of lanes
  static constexpr int kBlockD = kGroups * kChannels;
  static constexpr int kDstate = kStates * kLanes;  // at most

  // Floats in shared memory. The paddings keep threads that read fours together in different banks.
  static constexpr int kRow = kBlockL + 4;
  static constexpr int kYParts = kLanes <= 2 ? kLanes : kLanes / 4;
  static constexpr int kParts = kLanes <= 2 ? 2 : 2 + kYParts;
  static constexpr int kChannelRows = kParts * kRow + (kParts % 2 == 0 ? 4 : 0);
  static constexpr int kCoefficients = kBlockD * kChannelRows;
  static constexpr int kStage = kCoefficients + 2 * kDstate * kRow;

  // Row `r` of Δ (part 0) and Δu (part 1) in a stage, and of what adds up to y: of each lane in the
  // place of these, or of each four lanes after them.
  template <typename Float>
  __device__ static Float* cells(Float* stage, int part, int r) {
    return stage + r * kChannelRows + part * kRow;
  }
  static constexpr bool kInPlace = kLanes <= 2;
  __device__ static constexpr int y_part(int i) { return kInPlace ? 1 - i : 2 + i; }
  // Row of state n of B (0) or C (1). A lane's states are lane, lane + kLanes, …
  template <typename Float>
  __device__ static Float* coefficients(Float* stage, int which, int n) {
    return stage + kCoefficients + (which * kDstate + n) * kRow;
  }

  // The channel of the block that row `r` of a stage holds. Where a piece has two channels, these
  // are half the rows apart.
  template <bool kAlongSteps>
  __device__ static int channel_of(int r) {
    return kAlongSteps ? r : 2 * (r % (kBlockD / 2)) + r / (kBlockD / 2);
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

// A row may be cut into parts of equal length (but for the last), of whole chunks, that run side by
// side.
struct ScanParts {
  int64_t count = 1, length = 0;
  // (count - 1, rows, channels, dstate): by how much a part lets the states at its beginning decay,
  // and what it adds to them.
  float2* states = nullptr;
  float* delta_sums = nullptr;  // (count - 1, rows, channels), where the sums are wanted
};

// What a block works on.
struct ScanBlock {
  const SelectiveScanFwdParams& p;
  const ScanParts& parts;
  int64_t part, row_index;
  ScanRow row;  // only its steps of this part
  int64_t head, first_d;
  int channels;

  __device__ Tiles tiles() const {
    const int64_t length = row.end - row.begin;
    return {length, 0, p.chunk_states.data ? p.chunk_size : length};
  }

  __device__ bool is_last_part() const { return part == parts.count - 1; }
  __device__ int64_t part_channel(int64_t part, int d) const {
    return ((part * p.rows + row_index) * p.nheads + head) * p.headdim + first_d + d;
  }
  __device__ float2* part_state(int64_t part, int d, int n) const {
    return parts.states + part_channel(part, d) * p.dstate + n;
  }

  // The first element, at step t, of row `r` of an operand (batch, .., rows, steps).
  template <typename T>
  __device__ T* at(const Strided<4>& operand, int64_t head_or_group, int64_t r, int64_t t) const {
    return static_cast<T*>(operand.data) + row.batch * operand.stride[0] +
           head_or_group * operand.stride[1] + r * operand.stride[2] +
           (row.begin + t) * operand.stride[3];
  }
};

__device__ __forceinline__ float float_at(const Strided<2>& operand, int64_t head, int64_t d) {
  return static_cast<const float*>(operand.data)[head * operand.stride[0] + d * operand.stride[1]];
}

}  // namespace ssmcore::cuda
