// The recurrence itself, for one tile of channels: states stay in registers, time is serial.
#pragma once

#include <type_traits>

#include "vec_math.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

// States that one pass over time keeps in registers, beside the operands of a step.
#if defined(__AVX512F__)
inline constexpr int kBlockN = 16;
#elif defined(__AVX__)
inline constexpr int kBlockN = 8;
#else
inline constexpr int kBlockN = 4;
#endif

// One tile's operands over a chunk, as floats. Complex numbers are stored as parts: `part` values
// apart in A, B, C and state; side by side where B or C varies.
struct StatesOfTile {
  int64_t steps, dstate, part;
  const float* A;                // (dstate, kLanes): A log2(e); imaginary part: A / 2π
  const float *B, *C;            // constant: (dstate, kLanes); varying: (steps, dstate)
  const float *delta, *delta_u;  // (steps, kLanes)
  float* state;                  // (dstate, kLanes)
  float* y;                      // (steps, kLanes), added to
};

// B or C of state n at step t: the same for all channels where it varies in time, one number a
// channel where it is constant. kParts numbers make one of it.
template <bool kConstant, int kParts>
SSMCORE_INLINE Vec coefficient(const float* from, const StatesOfTile& s, int64_t t, int64_t n,
                               int part) {
  if constexpr (kConstant)
    return load(from + part * s.part + n * kLanes);
  else
    return broadcast(from[(t * s.dstate + n) * kParts + part]);
}

// What a scan keeps of every step besides y.
struct KeepNothing {
  template <typename... Values>
  SSMCORE_INLINE void operator()(Values...) const {}
};

// One step of one state: decay is exp(Δ A), x is Δ u.
SSMCORE_INLINE Vec advance(Vec h, Vec decay, Vec x, Vec B) {
  return decay * h + x * B;
}

// Advances states [n, n + kN) over the chunk and adds their share to y. At every step t it calls
// keep(t, i, decay, state) for i in [0, kN).
template <int kN, bool kConstantB, bool kConstantC, typename Keep = KeepNothing>
void scan_real_states(const StatesOfTile& s, int64_t n, const Keep& keep = {}) {
  Vec h[kN];
  for (int i = 0; i < kN; ++i) h[i] = load(s.state + (n + i) * kLanes);
  for (int64_t t = 0; t < s.steps; ++t) {
    const Vec dt = load(s.delta + t * kLanes), x = load(s.delta_u + t * kLanes);
    Vec sum = load(s.y + t * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) {
      const Vec decay = exp2(dt * load(s.A + (n + i) * kLanes));
      h[i] = advance(h[i], decay, x, coefficient<kConstantB, 1>(s.B, s, t, n + i, 0));
      sum += h[i] * coefficient<kConstantC, 1>(s.C, s, t, n + i, 0);
      keep(t, i, decay, h[i]);
    }
    store(s.y + t * kLanes, sum);
  }
  for (int i = 0; i < kN; ++i) store(s.state + (n + i) * kLanes, h[i]);
}

// The same for complex states: y += 2 Re(C h), and keep is given real and imaginary parts.
template <int kN, bool kConstantB, bool kConstantC, typename Keep = KeepNothing>
void scan_complex_states(const StatesOfTile& s, int64_t n, const Keep& keep = {}) {
  Vec re[kN], im[kN];
  for (int i = 0; i < kN; ++i) {
    re[i] = load(s.state + (n + i) * kLanes);
    im[i] = load(s.state + s.part + (n + i) * kLanes);
  }
  for (int64_t t = 0; t < s.steps; ++t) {
    const Vec dt = load(s.delta + t * kLanes), x = load(s.delta_u + t * kLanes);
    Vec sum{};
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {
      const float* A = s.A + (n + i) * kLanes;
      const Vec modulus = exp2(dt * load(A));
      Vec sine, cosine;
      sincos_turns(dt * load(A + s.part), &sine, &cosine);
      const Vec a_re = modulus * cosine, a_im = modulus * sine;
      const Vec next_re =
          a_re * re[i] - a_im * im[i] + x * coefficient<kConstantB, 2>(s.B, s, t, n + i, 0);
      im[i] = a_re * im[i] + a_im * re[i] + x * coefficient<kConstantB, 2>(s.B, s, t, n + i, 1);
      re[i] = next_re;
      sum += re[i] * coefficient<kConstantC, 2>(s.C, s, t, n + i, 0) -
             im[i] * coefficient<kConstantC, 2>(s.C, s, t, n + i, 1);
      keep(t, i, a_re, a_im, re[i], im[i]);
    }
    store(s.y + t * kLanes, load(s.y + t * kLanes) + 2.0f * sum);
  }
  for (int i = 0; i < kN; ++i) {
    store(s.state + (n + i) * kLanes, re[i]);
    store(s.state + s.part + (n + i) * kLanes, im[i]);
  }
}

// All states of a tile, in blocks.
template <bool kConstantB, bool kConstantC>
void scan_states(const StatesOfTile& s, bool is_complex) {
  int64_t n = 0;
  if (is_complex) {
    for (; n + 2 <= s.dstate; n += 2) scan_complex_states<2, kConstantB, kConstantC>(s, n);
    for (; n < s.dstate; ++n) scan_complex_states<1, kConstantB, kConstantC>(s, n);
    return;
  }
  for (; n + kBlockN <= s.dstate; n += kBlockN)
    scan_real_states<kBlockN, kConstantB, kConstantC>(s, n);
  for (; n + 4 <= s.dstate; n += 4) scan_real_states<4, kConstantB, kConstantC>(s, n);
  for (; n < s.dstate; ++n) scan_real_states<1, kConstantB, kConstantC>(s, n);
}

inline void scan_states(const StatesOfTile& s, bool is_complex, bool constant_B, bool constant_C) {
  const auto scan = constant_B
                        ? (constant_C ? scan_states<true, true> : scan_states<true, false>)
                        : (constant_C ? scan_states<false, true> : scan_states<false, false>);
  scan(s, is_complex);
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
