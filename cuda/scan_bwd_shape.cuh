// How scan_bwd_kernel.cuh cuts its work, and what its parts share.
#pragma once

#include "scan_bwd_plan.h"
#include "scan_shape.cuh"

namespace ssmcore::cuda {

// ⌈n / size⌉, on the device.
__device__ __forceinline__ int64_t pieces_of(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

// A block takes kBlockD channels; a warp eight of them, four neighbouring states to a thread. Time
// passes in tiles.
template <typename T>
struct ScanBwdShape {
  static constexpr bool kIsBfloat16 = std::is_same_v<T, bfloat16>;
  static constexpr int kBlockD =
      static_cast<int>(scan_bwd_block_d(kIsBfloat16 ? DType::bfloat16 : DType::float32));
  static constexpr int kTile = kScanBwdTile;
  static constexpr int kDstate = 16, kStates = 4;  // at most, and of a thread
  static constexpr int kWarpD = 8, kWarps = kBlockD / kWarpD, kThreads = 32 * kWarps;

  // Floats in shared memory: planes of channels by steps, B and C as states by steps. The padding
  // keeps threads that read fours together in different banks.
  static constexpr int kRow = kTile + 4, kPlane = kBlockD * kRow;
  static constexpr int kCoefficients = kDstate * kRow;
  static constexpr int kHistory = kBlockD * kDstate / (kIsBfloat16 ? 2 : 1);  // of a step

  // The channel of the block that row `r` of a plane holds. Where a piece has two channels, these
  // are half the rows apart.
  template <bool kAlongSteps>
  __device__ static int channel_of(int r) {
    return kAlongSteps ? r : 2 * (r % (kBlockD / 2)) + r / (kBlockD / 2);
  }
};

// What a block goes over tile by tile.
enum class ScanBwdOperand { u, delta, z, dout, du, ddelta, dz, B, C, states, products, count };

// What scan_bwd_scales.cuh has to know about a tile, as the largest absolute values, and of A the
// largest value, if positive, in all tiles.
enum class ScanBwdBound { A, delta, delta_u, dy, B, C, states, gradients, count };

// A block's shared memory.
template <typename T>
class ScanBwdMemory : ScanBwdShape<T> {
  using Shape = ScanBwdShape<T>;

 public:
  __device__ explicit ScanBwdMemory(float* memory) : memory_(memory) {}

  // Row r of a plane.
  __device__ float* delta(int r) const { return memory_ + r * Shape::kRow; }
  __device__ float* delta_u(int r) const { return delta(r) + Shape::kPlane; }
  __device__ float* dy(int r) const { return delta(r) + 2 * Shape::kPlane; }
  // The gradient of Δ by way of the decay, in the place of dy.
  __device__ float* by_decay(int r) const { return dy(r); }
  // y; later, in its place, the gradient of Δu.
  __device__ float* y(int r) const { return memory_ + kY + r * Shape::kRow; }
  __device__ float* dx(int r) const { return y(r); }
  // State n of B (0) or C (1).
  __device__ float* coefficients(int which, int n) const {
    return memory_ + 3 * Shape::kPlane + which * Shape::kCoefficients + n * Shape::kRow;
  }
  // Where an operand's tile begins, at the block's first channel, and the bytes to the tile after;
  // kept here for want of registers.
  struct Place {
    char* at;
    int64_t step;
  };
  __device__ Place& place(ScanBwdOperand operand) const {
    return reinterpret_cast<Place*>(memory_ + kPlaces)[static_cast<int>(operand)];
  }
  // Of the tile, and the number of the last one that is done.
  __device__ int& steps() const { return reinterpret_cast<int*>(memory_)[kBounds - 2]; }
  __device__ int& last_tile() const { return reinterpret_cast<int*>(memory_)[kBounds - 1]; }
  // To the next tile. Between barriers.
  __device__ void advance(int steps) const {
    if (threadIdx.x >= static_cast<int>(ScanBwdOperand::count)) return;
    this->steps() = steps;
    Place& place = this->place(static_cast<ScanBwdOperand>(threadIdx.x));
    place.at += place.step;
  }
  // Where bounds of all threads are, as words that are ordered like the floats.
  __device__ uint32_t* bounds() const { return reinterpret_cast<uint32_t*>(memory_ + kBounds); }
  __device__ float& bias(int d) const { return memory_[kParameters + d]; }
  __device__ float& D(int d) const { return memory_[kParameters + Shape::kBlockD + d]; }
  // Four sums of a thread.
  __device__ float* thread_sums(int thread = threadIdx.x) const {
    return memory_ + kSums + 4 * thread;
  }
  // See ScanBwdHistory.
  __device__ float* history() const { return memory_ + kHistories; }

 private:
  static constexpr int kPlaces = 3 * Shape::kPlane + 2 * Shape::kCoefficients;
  static constexpr int kBounds = kPlaces + 4 * static_cast<int>(ScanBwdOperand::count) + 4;
  static constexpr int kParameters = kBounds + static_cast<int>(ScanBwdBound::count);
  static constexpr int kSums = kParameters + 2 * Shape::kBlockD;
  static constexpr int kY = kSums + 4 * Shape::kThreads;
  static constexpr int kHistories = kY + Shape::kPlane;
  static_assert(kHistories % 4 == 0);

 public:
  static constexpr size_t kBytes =
      sizeof(float) * (kHistories + (Shape::kTile + 1) * Shape::kHistory);
  static_assert(kBytes <= kScanBwdSharedBytes);
  static constexpr size_t kBytesOfStates = sizeof(float) * kY;  // without what comes after

 private:
  float* const memory_;
};

// The channels of a block.
template <typename T>
struct ScanBwdBlock {
  const SelectiveScanBwdParams& p;
  const ScanBwdMemory<T> memory;
  int64_t head, first_d;
  int channels;

  // Channel d among those of all heads.
  __device__ int64_t channel(int d) const { return head * p.fwd.headdim + first_d + d; }
};

}  // namespace ssmcore::cuda
