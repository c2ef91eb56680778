// One step of many dot products at once: how weights of each dtype are read, multiplied and added.
#pragma once

#include <cstring>

#include "row.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

// A product has
//   W, X            the elements of a weight's row as stored, and of a row of x as staged
//   kRegisters      registers of weights to a step, and kStep elements
//   Register        what one of them is
//   stage()         puts a row of x in the order in which steps read it
//   read(), add()   one step: registers of weights, and sum + weights · x

// x and weights in float32, or weights widened to it.
template <typename WeightType>
struct FloatProduct {
  using W = WeightType;
  using X = float;
  using Register = Vec;
  static constexpr int kRegisters = 1;
  static constexpr int64_t kStep = kLanes;

  static void stage(const void* from, DType dtype, int64_t stride, int64_t n, float* x) {
    load_row(from, dtype, stride, n, x);
  }
  static SSMCORE_INLINE void read(const W* from, Vec* weights) { weights[0] = load(from); }
  static SSMCORE_INLINE Vec read_x(const float* from) { return in_register(load(from)); }
  static SSMCORE_INLINE Vec add(Vec sum, Vec weights, Vec x) { return sum + weights * x; }
};

// Two bfloat16 are the halves of one 32-bit lane: shifting and masking turn them into floats more
// cheaply than widening does. x is then read as even, then odd elements.
template <>
struct FloatProduct<bfloat16> : FloatProduct<float> {
  using W = bfloat16;
  static constexpr int kRegisters = 2;
  static constexpr int64_t kStep = 2 * kLanes;

  static void stage(const void* from, DType dtype, int64_t stride, int64_t n, float* x) {
    load_row(from, dtype, stride, n, x);
    float even_odd[kStep];
    for (int64_t i = 0; i < n; i += kStep) {
      for (int lane = 0; lane < kLanes; ++lane) {
        even_odd[lane] = x[i + 2 * lane];
        even_odd[kLanes + lane] = x[i + 2 * lane + 1];
      }
      std::memcpy(x + i, even_odd, sizeof(even_odd));
    }
  }
  static SSMCORE_INLINE void read(const bfloat16* from, Vec* weights) {
    UintVec pairs;
    std::memcpy(&pairs, from, sizeof(pairs));
    weights[0] = bit_cast<Vec>(pairs << 16);
    weights[1] = bit_cast<Vec>(pairs & 0xffff0000u);
  }
};

#if defined(__AVX512BF16__)
// bfloat16 by bfloat16, two products to a lane.
struct Bfloat16Product {
  using W = bfloat16;
  using X = bfloat16;
  using Register = UintVec;
  static constexpr int kRegisters = 1;
  static constexpr int64_t kStep = 2 * kLanes;

  static void stage(const void* from, DType, int64_t stride, int64_t n, bfloat16* x) {
    const bfloat16* at = static_cast<const bfloat16*>(from);
    if (stride == 1)
      std::memcpy(x, at, sizeof(bfloat16) * n);
    else
      for (int64_t i = 0; i < n; ++i) x[i] = at[i * stride];
  }
  static SSMCORE_INLINE void read(const bfloat16* from, UintVec* weights) {
    std::memcpy(weights, from, sizeof(*weights));
  }
  static SSMCORE_INLINE UintVec read_x(const bfloat16* from) {
    UintVec x;
    std::memcpy(&x, from, sizeof(x));
    return x;
  }
  static SSMCORE_INLINE Vec add(Vec sum, UintVec weights, UintVec x) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)x);
  }
};
#endif

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
