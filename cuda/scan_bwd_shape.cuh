// How scan_bwd_kernel.cuh cuts its work, and what its parts share.
#pragma once

#include "device/arrival.cuh"
#include "scan_bwd_plan.h"
#include "scan_shape.cuh"

namespace ssmcore::cuda {

// ⌈n / size⌉, on the device.
__device__ __forceinline__ int64_t pieces_of(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

// A block takes kBlockD channels; a warp eight of them, four neighbouring states to a thread. Time
// passes in tiles, and these in spans of kSpan steps.
struct ScanBwdShape {
  static constexpr int kBlockD = kScanBwdBlockD, kTile = kScanBwdTile, kSpan = 8;
  static constexpr int kDstate = 16, kStates = 4;  // at most, and of a thread
  static constexpr int kWarpD = 8, kWarps = kBlockD / kWarpD, kThreads = 32 * kWarps;

  // Floats in shared memory: planes of channels by steps, B and C as states by steps. The padding
  // keeps threads that read fours together in different banks.
  static constexpr int kRow = kTile + 4, kPlane = kBlockD * kRow;
  static constexpr int kCoefficients = kDstate * kRow;
  // Of a warp and span: four floats of each thread.
  static constexpr int kSpans = kTile / kSpan, kSpanSlots = 4 * 32, kSlots = kSpans * kSpanSlots;
  // What is added to dB and dC in a span.
  static constexpr int kProducts = kSpan * 2 * kDstate;

  // The channel of the block that row `r` of a plane holds. Where a piece has two channels, these
  // are half the rows apart.
  template <bool kAlongSteps>
  __device__ static int channel_of(int r) {
    return kAlongSteps ? r : 2 * (r % (kBlockD / 2)) + r / (kBlockD / 2);
  }
};

// Operands (batch, nheads, headdim, seqlen).
enum class ScanBwdOperand { u, delta, z, dout, du, ddelta, dz, count };

// A block's shared memory.
class ScanBwdMemory : ScanBwdShape {
 public:
  __device__ explicit ScanBwdMemory(float* memory) : memory_(memory) {}

  __device__ int offset(const float* at) const { return static_cast<int>(at - memory_); }
  __device__ float* at(int offset) const { return memory_ + offset; }

  // Row r of a plane. The gradient of Δ by way of the decay takes the place of Δu.
  __device__ float* delta(int r) const { return memory_ + r * kRow; }
  __device__ float* delta_u(int r) const { return memory_ + kPlane + r * kRow; }
  __device__ float* dy(int r) const { return memory_ + 2 * kPlane + r * kRow; }
  // State n of B (0) or C (1).
  __device__ float* coefficients(int which, int n) const {
    return memory_ + 3 * kPlane + which * kCoefficients + n * kRow;
  }
  // The element with which the row of an operand begins, at the block's first channel.
  __device__ int64_t& row_at(ScanBwdOperand operand) const {
    return reinterpret_cast<int64_t*>(memory_ + kRows)[static_cast<int>(operand)];
  }
  __device__ float& bias(int d) const { return memory_[kParameters + d]; }
  __device__ float& D(int d) const { return memory_[kParameters + kBlockD + d]; }
  // Four sums of a thread.
  __device__ float* thread_sums(int thread = threadIdx.x) const {
    return memory_ + kSums + 4 * thread;
  }
  // A thread's states at the beginning of a span; later, in their place, four steps of y, or of the
  // gradient of Δu, of a channel.
  __device__ float* start(int warp, int span, int lane) const {
    return memory_ + kStarts + warp * kSlots + span * kSpanSlots + 4 * lane;
  }
  // Four number `four` of a row's tile.
  __device__ float* y(int r, int four) const {
    return start(r / kWarpD, four / 2, r % kWarpD + kWarpD * (four % 2));
  }
  __device__ float* dx(int r, int four) const {
    return start(r / kWarpD, four / 2, r % kWarpD + kWarpD * (2 + four % 2));
  }
  // What the warps so far have added to dB and dC in a span: eight floats of each thread.
  __device__ float* products(int span, int lane) const {
    return memory_ + kAllProducts + span * kProducts + 8 * lane;
  }
  // That a warp, but for the last, has added to them.
  __device__ Arrival* added(int span, int warp) const {
    return reinterpret_cast<Arrival*>(memory_ + kArrivals) + span * (kWarps - 1) + warp;
  }

 private:
  static constexpr int kRows = 3 * kPlane + 2 * kCoefficients;
  static constexpr int kParameters = kRows + 2 * static_cast<int>(ScanBwdOperand::count) + 2;
  static constexpr int kSums = kParameters + 2 * kBlockD;
  static constexpr int kStarts = kSums + 4 * kThreads;
  static constexpr int kAllProducts = kStarts + kWarps * kSlots;
  static constexpr int kArrivals = kAllProducts + kSpans * kProducts;

 public:
  static constexpr size_t kBytes =
      sizeof(float) * kArrivals + sizeof(Arrival) * kSpans * (kWarps - 1);
  static_assert(kBytes == kScanBwdSharedBytes);
  static constexpr size_t kBytesOfStates = sizeof(float) * kStarts;  // without what comes after

 private:
  float* const memory_;
};

// The channels of a block, in one row at a time.
struct ScanBwdBlock {
  const SelectiveScanBwdParams& p;
  const ScanBwdMemory memory;
  int64_t head, first_d;
  int channels;
  int64_t row_index = 0;
  ScanRow row{};

  // Channel d among those of all heads.
  __device__ int64_t channel(int d) const { return head * p.fwd.headdim + first_d + d; }

  // The element at step t of the row, of row `r` of an operand (batch, .., rows, steps).
  __device__ int64_t at(const Strided<4>& operand, int64_t head_or_group, int64_t r,
                        int64_t t) const {
    return row.batch * operand.stride[0] + head_or_group * operand.stride[1] +
           r * operand.stride[2] + (row.begin + t) * operand.stride[3];
  }
};

}  // namespace ssmcore::cuda
