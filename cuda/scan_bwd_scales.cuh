// Powers of two by which the scan's backward multiplies what it stores as float16, so that nothing
// overflows, and what is smaller by a factor of up to 2^29 keeps its 11 bits.
#pragma once

#include "device/math.cuh"
#include "scan_bwd_shape.cuh"

namespace ssmcore::cuda {

// What one thread knows of a tile's bounds. NaN and infinity do not count: they stay what they are.
class ScanBwdBounds {
 public:
  __device__ __forceinline__ void include(ScanBwdBound bound, float value) {
    float& most = most_[static_cast<int>(bound)];
    most = fmaxf(most, fabsf(value));
  }
  template <typename T>
  __device__ __forceinline__ void store(const ScanBwdMemory<T>& memory) const {
    if (!ScanBwdShape<T>::kIsBfloat16) return;
#pragma unroll
    for (int i = 0; i < static_cast<int>(ScanBwdBound::count); ++i) {
      const float finite = most_[i] < INFINITY ? most_[i] : 0.0f;
      const unsigned most = __reduce_max_sync(~0u, __float_as_uint(finite));
      if (threadIdx.x % 32 == 0 && most > 0) atomicMax(memory.bounds() + i, most);
    }
  }
  // By one warp: for the next tile.
  template <typename T>
  __device__ __forceinline__ static void reset(const ScanBwdMemory<T>& memory, bool all) {
    if (threadIdx.x < static_cast<int>(ScanBwdBound::count) && (all || threadIdx.x > 0))
      memory.bounds()[threadIdx.x] = 0;
  }

 private:
  float most_[static_cast<int>(ScanBwdBound::count)] = {};
};

// All are 1 for other types than bfloat16, of which float32 is stored.
template <typename T>
class ScanBwdScales {
 public:
  explicit __device__ ScanBwdScales(const ScanBwdMemory<T>& memory) : memory_(memory) {}

  // Of the states of a tile, and of their gradients: none grows by more than A lets it.
  __device__ __forceinline__ float states() const {
    return of_sum(ScanBwdBound::states, ScanBwdBound::delta_u, ScanBwdBound::B);
  }
  __device__ __forceinline__ float gradients() const {
    return of_sum(ScanBwdBound::gradients, ScanBwdBound::dy, ScanBwdBound::C);
  }
  __device__ __forceinline__ float of(ScanBwdBound bound) const { return to_range(most(bound)); }

 private:
  __device__ __forceinline__ float most(ScanBwdBound bound) const {
    return __uint_as_float(memory_.bounds()[static_cast<int>(bound)]);
  }
  __device__ __forceinline__ float of_sum(ScanBwdBound first, ScanBwdBound x,
                                          ScanBwdBound K) const {
    constexpr float kSteps = ScanBwdShape<T>::kTile;
    const float growth = exp2_approx(kSteps * most(ScanBwdBound::delta) * most(ScanBwdBound::A));
    return to_range(growth * (most(first) + kSteps * most(x) * most(K)));
  }
  // 2^n with 2^14 <= most · 2^n < 2^15, or as far as float32 allows.
  __device__ __forceinline__ static float to_range(float most) {
    if (!ScanBwdShape<T>::kIsBfloat16) return 1;
    const int exponent = __float_as_uint(most) >> 23;  // plus 127
    return __uint_as_float(static_cast<unsigned>(min(14 + 254 - exponent, 227)) << 23);
  }

  const ScanBwdMemory<T> memory_;
};

// 1 / 2^n.
__device__ __forceinline__ float inverse_power(float power) {
  return __uint_as_float((254u << 23) - __float_as_uint(power));
}

}  // namespace ssmcore::cuda
