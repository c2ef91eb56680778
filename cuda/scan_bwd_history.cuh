// What the scan's backward remembers of a tile, and how the tensor cores read it.
#pragma once

#include "device/tensor_product.cuh"
#include "scan_bwd_shape.cuh"

namespace ssmcore::cuda {

// The states before a tile and after each of its steps, and in their place, from the last step on,
// their gradients: (1 + kTile, kBlockD, kDstate) in shared memory. A thread stores and loads four
// states of a channel. The tensor cores multiply (kBlockD, kDstate) matrices of one step, sixteen
// channels at a time, by a vector; `Left` is such a matrix or its transpose as they take it, and
// `Right` is the vector in one of eight columns, of which a thread gives factors number
// inner(lane, 0) to inner(lane, 3).
//
// As float32.
template <typename T>
class ScanBwdHistory {
  using Shape = ScanBwdShape<T>;

 public:
  struct Left {
    float value[2][4];
  };
  struct Right {
    float value[4];
  };

  __device__ ScanBwdHistory(const ScanBwdMemory<T>& memory, int lane)
      : memory_(memory.history()), g_(lane / 4), k_(lane % 4) {}

  __device__ __forceinline__ static float* at(const ScanBwdMemory<T>& memory, int row,
                                              int first_n) {
    return memory.history() + row * Shape::kDstate + first_n;
  }
  __device__ __forceinline__ static void store(float* at, int slot, const Four& states) {
    store_four(at + slot * Shape::kHistory, states);
  }
  __device__ __forceinline__ static Four load(const float* at, int slot) {
    return load_four(at + slot * Shape::kHistory);
  }

  template <bool kOverStates>
  __device__ __forceinline__ static int inner(int lane, int i) {
    return kOverStates ? lane % 4 * 4 + i : lane % 4 + 4 * i;
  }
  template <bool kOverStates>
  __device__ __forceinline__ Left left(int slot, int first_row) const {
    const float* const from = memory_ + slot * Shape::kHistory + first_row * Shape::kDstate;
    Left left;
    if constexpr (kOverStates) {
      const Four low = load_four(from + g_ * Shape::kDstate + 4 * k_);
      const Four high = load_four(from + (g_ + 8) * Shape::kDstate + 4 * k_);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left.value[i / 2][i % 2 * 2] = low.value[i];
        left.value[i / 2][i % 2 * 2 + 1] = high.value[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const row = from + (k_ + 4 * i) * Shape::kDstate + g_;
        left.value[i / 2][i % 2 * 2] = row[0];
        left.value[i / 2][i % 2 * 2 + 1] = row[8];
      }
    }
    return left;
  }
  __device__ __forceinline__ static Right right(const float (&factor)[4]) {
    return {factor[0], factor[1], factor[2], factor[3]};
  }
  __device__ __forceinline__ static Right only_if(bool condition, const Right& right) {
    Right result;
#pragma unroll
    for (int i = 0; i < 4; ++i) result.value[i] = condition ? right.value[i] : 0.0f;
    return result;
  }
  __device__ __forceinline__ static void multiply(float (&sum)[4], const Left& left,
                                                  const Right& right) {
    multiply_split(sum, left.value[0], {right.value[0], right.value[1]});
    multiply_split(sum, left.value[1], {right.value[2], right.value[3]});
  }

 private:
  const float* const memory_;
  const int g_, k_;
};

// Of bfloat16 as float16, scaled (scan_bwd_scales.cuh). The halves of a channel's states change
// places in every second four of channels, so that eight channels' lie in different banks.
template <>
class ScanBwdHistory<bfloat16> {
  using Shape = ScanBwdShape<bfloat16>;
  static constexpr int kRow = Shape::kDstate / 2;  // words of a channel

 public:
  struct Left {
    uint32_t word[4];
  };
  struct Right {
    uint32_t word[2];
  };

  __device__ ScanBwdHistory(const ScanBwdMemory<bfloat16>& memory, int lane) {
    const int row = lane % 8, upper = lane / 8 % 2, last = lane / 16;
    const auto of = [&](int row, int half) {
      return memory.history() + row * kRow + (half ^ (row / 4 % 2)) * 4;
    };
    over_states_ = of(row + 8 * upper, last);
    over_channels_ = of(row + 8 * last, upper);
  }

  __device__ __forceinline__ static float* at(const ScanBwdMemory<bfloat16>& memory, int row,
                                              int first_n) {
    return memory.history() + row * kRow + ((first_n / 8) ^ (row / 4 % 2)) * 4 + first_n % 8 / 2;
  }
  __device__ __forceinline__ static void store(float* at, int slot, const Four& states) {
    *reinterpret_cast<uint2*>(at + slot * Shape::kHistory) = make_uint2(
        pack_f16(states.value[0], states.value[1]), pack_f16(states.value[2], states.value[3]));
  }
  __device__ __forceinline__ static Four load(const float* at, int slot) {
    const uint2 words = *reinterpret_cast<const uint2*>(at + slot * Shape::kHistory);
    return {low_half(words.x, float16()), high_half(words.x, float16()),
            low_half(words.y, float16()), high_half(words.y, float16())};
  }

  template <bool kOverStates>
  __device__ __forceinline__ static int inner(int lane, int i) {
    return lane % 4 * 2 + i % 2 + i / 2 * 8;
  }
  template <bool kOverStates>
  __device__ __forceinline__ Left left(int slot, int first_row) const {
    Left left;
    load_matrices<!kOverStates>(left.word, (kOverStates ? over_states_ : over_channels_) +
                                               slot * Shape::kHistory + first_row * kRow);
    return left;
  }
  __device__ __forceinline__ static Right right(const float (&factor)[4]) {
    return {pack_f16(factor[0], factor[1]), pack_f16(factor[2], factor[3])};
  }
  __device__ __forceinline__ static Right only_if(bool condition, const Right& right) {
    return {condition ? right.word[0] : 0u, condition ? right.word[1] : 0u};
  }
  __device__ __forceinline__ static void multiply(float (&sum)[4], const Left& left,
                                                  const Right& right) {
    multiply_f16(sum, left.word, right.word);
  }

 private:
  const float *over_states_, *over_channels_;  // of slot 0, as load_matrices() wants the rows
};

}  // namespace ssmcore::cuda
