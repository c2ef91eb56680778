// The sums of a causal convolution over tiles, which are also those of its gradient.
#pragma once

#include <cstring>
#include <type_traits>

#include "tile.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

// Calls body(width) with the usual widths as constants.
template <typename Body>
SSMCORE_INLINE void with_width(int64_t width, const Body& body) {
  switch (width) {
    case 2:
      return body(std::integral_constant<int64_t, 2>());
    case 3:
      return body(std::integral_constant<int64_t, 3>());
    case 4:
      return body(std::integral_constant<int64_t, 4>());
    default:
      return body(width);
  }
}

// out(t) = bias + Σ_i weight(i) x(t + i).
inline void convolve(const float* weight, Vec bias, const float* x, int64_t any_width,
                     int64_t steps, float* out) {
  with_width(any_width, [&](auto width) {
    for (int64_t t = 0; t < steps; ++t) {
      Vec sum = bias;
      for (int64_t i = 0; i < width; ++i)
        sum += load(weight + i * kLanes) * load(x + (t + i) * kLanes);
      store(out + t * kLanes, sum);
    }
  });
}

// The numbers of one row's steps (seq_idx).
struct StepNumbers {
  const int32_t* numbers = nullptr;
  int64_t stride = 0, seqlen = 0;

  explicit operator bool() const { return numbers != nullptr; }
  int32_t operator[](int64_t t) const { return numbers[t * stride]; }
  // Whether there is a step `other`, of the same number as step t.
  bool same(int64_t t, int64_t other) const {
    return other >= 0 && other < seqlen && numbers[other * stride] == numbers[t * stride];
  }
};

inline StepNumbers numbers_of(const Strided<2>& seq_idx, int64_t batch, int64_t seqlen) {
  if (!seq_idx) return {};
  return {static_cast<const int32_t*>(seq_idx.data) + batch * seq_idx.stride[0], seq_idx.stride[1],
          seqlen};
}

// The same over steps from t on of the row, where x(0) is `delay` steps before it, and only the
// steps of a sum's own number count.
inline void convolve_numbered(const float* weight, Vec bias, const float* x, int64_t width,
                              const StepNumbers& numbers, int64_t t, int64_t delay, int64_t steps,
                              float* out) {
  for (int64_t i = 0; i < steps; ++i) {
    Vec sum = bias;
    for (int64_t k = 0; k < width; ++k)
      if (numbers.same(t + i, t + i - delay + k))
        sum += load(weight + k * kLanes) * load(x + (i + k) * kLanes);
    store(out + i * kLanes, sum);
  }
}

inline void zero_negative_steps(const StepNumbers& numbers, int64_t t, int64_t steps, float* out) {
  for (int64_t i = 0; i < steps; ++i)
    if (numbers[t + i] < 0) store(out + i * kLanes, Vec{});
}

inline void copy_rows(float* to, const float* from, int64_t rows) {
  std::memmove(to, from, sizeof(float) * rows * kLanes);
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
