// The recurrence in reverse, for one tile of channels over a block of steps: the states are
// computed again and kept, then the gradients of the states, in registers, go back in time.
#pragma once

#include "scan_states.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

// States that one pass keeps in registers, each with its gradient and that of A.
inline constexpr int kBwdBlockN = kLanes >= 16 ? 8 : 4;
inline constexpr int kBwdComplexBlockN = 2;

// One tile's operands over a block of steps. Complex numbers are stored as in StatesOfTile: side by
// side in dB or dC where B or C varies, and parts `part` values apart elsewhere.
struct BlockOfTile {
  StatesOfTile fwd;    // its state, that before the block, is advanced
  const float* dy;     // (steps, kLanes)
  float *dstate, *dA;  // (dstate, kLanes); dA is added to
  float *dB, *dC;      // added to: (dstate, kLanes) where constant, else (steps, dstate, kLanes)
  float *dx, *ddelta;  // (steps, kLanes), added to: d(Δu); dΔ / ln 2 without the share of dx
  float *history, *decays;  // scratch: history_size(steps) each
};

inline int64_t history_size(int64_t steps) {
  return (steps + 1) * (kBwdBlockN > 2 * kBwdComplexBlockN ? kBwdBlockN : 2 * kBwdComplexBlockN) *
         kLanes;
}

// Where the gradient of `coefficient` is summed up.
template <bool kConstant, int kParts>
SSMCORE_INLINE float* gradient_of(float* to, const StatesOfTile& s, int64_t t, int64_t n,
                                  int part) {
  if constexpr (kConstant)
    return to + part * s.part + n * kLanes;
  else
    return to + ((t * s.dstate + n) * kParts + part) * kLanes;
}

SSMCORE_INLINE void add(float* to, Vec v) {
  store(to, load(to) + v);
}

// Advances states [n, n + kN) over the block and keeps them: row t of the history, (kN, kLanes), is
// before step t.
template <int kN, bool kConstantB, bool kConstantC>
void record_real_states(const BlockOfTile& block, int64_t n) {
  for (int i = 0; i < kN; ++i)
    store(block.history + i * kLanes, load(block.fwd.state + (n + i) * kLanes));
  scan_real_states<kN, kConstantB, kConstantC>(
      block.fwd, n, [&](int64_t t, int i, Vec decay, Vec state) {
        store(block.decays + (t * kN + i) * kLanes, decay);
        store(block.history + ((t + 1) * kN + i) * kLanes, state);
      });
}

template <int kN, bool kConstantB, bool kConstantC>
void reverse_real_states(const BlockOfTile& block, int64_t n) {
  const StatesOfTile& s = block.fwd;
  Vec g[kN], dA[kN];
  for (int i = 0; i < kN; ++i) {
    g[i] = load(block.dstate + (n + i) * kLanes);
    dA[i] = Vec{};
  }
  for (int64_t t = s.steps - 1; t >= 0; --t) {
    const Vec dt = load(s.delta + t * kLanes), x = load(s.delta_u + t * kLanes);
    const Vec dy = load(block.dy + t * kLanes);
    const float* decays = block.decays + t * kN * kLanes;
    const float* before = block.history + t * kN * kLanes;
    const float* after = before + kN * kLanes;
    Vec dx = load(block.dx + t * kLanes), ddelta = load(block.ddelta + t * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kN; ++i) {
      g[i] += dy * coefficient<kConstantC, 1>(s.C, s, t, n + i, 0);
      add(gradient_of<kConstantC, 1>(block.dC, s, t, n + i, 0), dy * load(after + i * kLanes));
      add(gradient_of<kConstantB, 1>(block.dB, s, t, n + i, 0), x * g[i]);
      dx += g[i] * coefficient<kConstantB, 1>(s.B, s, t, n + i, 0);
      g[i] *= load(decays + i * kLanes);
      const Vec q = g[i] * load(before + i * kLanes);
      ddelta += q * load(s.A + (n + i) * kLanes);
      dA[i] += q * dt;
    }
    store(block.dx + t * kLanes, dx);
    store(block.ddelta + t * kLanes, ddelta);
  }
  for (int i = 0; i < kN; ++i) {
    store(block.dstate + (n + i) * kLanes, g[i]);
    add(block.dA + (n + i) * kLanes, dA[i]);
  }
}

// The same for complex states: rows are (kN, parts, kLanes).
template <int kN, bool kConstantB, bool kConstantC>
void record_complex_states(const BlockOfTile& block, int64_t n) {
  const StatesOfTile& s = block.fwd;
  const auto store_pair = [](float* to, int64_t index, Vec re, Vec im) {
    store(to + 2 * index * kLanes, re);
    store(to + (2 * index + 1) * kLanes, im);
  };
  for (int i = 0; i < kN; ++i)
    store_pair(block.history, i, load(s.state + (n + i) * kLanes),
               load(s.state + s.part + (n + i) * kLanes));
  scan_complex_states<kN, kConstantB, kConstantC>(
      s, n, [&](int64_t t, int i, Vec a_re, Vec a_im, Vec re, Vec im) {
        store_pair(block.decays, t * kN + i, a_re, a_im);
        store_pair(block.history, (t + 1) * kN + i, re, im);
      });
}

template <int kN, bool kConstantB, bool kConstantC>
void reverse_complex_states(const BlockOfTile& block, int64_t n) {
  // A's imaginary part is stored over 2π, its real part over ln 2, as ddelta is summed up.
  constexpr float kTurnsToLog2 = kLog2e / kTurnsPerRadian;
  const StatesOfTile& s = block.fwd;
  Vec re[kN], im[kN], dA_re[kN], dA_im[kN];
  for (int i = 0; i < kN; ++i) {
    re[i] = load(block.dstate + (n + i) * kLanes);
    im[i] = load(block.dstate + s.part + (n + i) * kLanes);
    dA_re[i] = dA_im[i] = Vec{};
  }
  for (int64_t t = s.steps - 1; t >= 0; --t) {
    const Vec dt = load(s.delta + t * kLanes), x = load(s.delta_u + t * kLanes);
    const Vec dy = 2.0f * load(block.dy + t * kLanes);
    const float* decays = block.decays + t * 2 * kN * kLanes;
    const float* before = block.history + t * 2 * kN * kLanes;
    const float* after = before + 2 * kN * kLanes;
    Vec dx = load(block.dx + t * kLanes), ddelta = load(block.ddelta + t * kLanes);
#pragma GCC unroll 2
    for (int i = 0; i < kN; ++i) {
      const float* A = s.A + (n + i) * kLanes;
      const int re_at = 2 * i * kLanes, im_at = (2 * i + 1) * kLanes;
      re[i] += dy * coefficient<kConstantC, 2>(s.C, s, t, n + i, 0);
      im[i] -= dy * coefficient<kConstantC, 2>(s.C, s, t, n + i, 1);
      add(gradient_of<kConstantC, 2>(block.dC, s, t, n + i, 0), dy * load(after + re_at));
      add(gradient_of<kConstantC, 2>(block.dC, s, t, n + i, 1), -dy * load(after + im_at));
      add(gradient_of<kConstantB, 2>(block.dB, s, t, n + i, 0), x * re[i]);
      add(gradient_of<kConstantB, 2>(block.dB, s, t, n + i, 1), x * im[i]);
      dx += re[i] * coefficient<kConstantB, 2>(s.B, s, t, n + i, 0) +
            im[i] * coefficient<kConstantB, 2>(s.B, s, t, n + i, 1);
      const Vec a_re = load(decays + re_at), a_im = load(decays + im_at);
      const Vec earlier_re = a_re * re[i] + a_im * im[i];
      im[i] = a_re * im[i] - a_im * re[i];
      re[i] = earlier_re;
      const Vec h_re = load(before + re_at), h_im = load(before + im_at);
      const Vec q_re = re[i] * h_re + im[i] * h_im, q_im = im[i] * h_re - re[i] * h_im;
      ddelta += q_re * load(A) + q_im * (kTurnsToLog2 * load(A + s.part));
      dA_re[i] += q_re * dt;
      dA_im[i] += q_im * dt;
    }
    store(block.dx + t * kLanes, dx);
    store(block.ddelta + t * kLanes, ddelta);
  }
  for (int i = 0; i < kN; ++i) {
    store(block.dstate + (n + i) * kLanes, re[i]);
    store(block.dstate + s.part + (n + i) * kLanes, im[i]);
    add(block.dA + (n + i) * kLanes, dA_re[i]);
    add(block.dA + s.part + (n + i) * kLanes, dA_im[i]);
  }
}

template <int kN, bool kComplex, bool kConstantB, bool kConstantC>
void reverse_some(const BlockOfTile& block, int64_t n) {
  if constexpr (kComplex) {
    record_complex_states<kN, kConstantB, kConstantC>(block, n);
    reverse_complex_states<kN, kConstantB, kConstantC>(block, n);
  } else {
    record_real_states<kN, kConstantB, kConstantC>(block, n);
    reverse_real_states<kN, kConstantB, kConstantC>(block, n);
  }
}

// All states of a tile, some at a time.
template <bool kComplex, bool kConstantB, bool kConstantC>
void reverse_states(const BlockOfTile& block) {
  constexpr int kN = kComplex ? kBwdComplexBlockN : kBwdBlockN;
  int64_t n = 0;
  for (; n + kN <= block.fwd.dstate; n += kN)
    reverse_some<kN, kComplex, kConstantB, kConstantC>(block, n);
  for (; n < block.fwd.dstate; ++n) reverse_some<1, kComplex, kConstantB, kConstantC>(block, n);
}

template <bool kComplex>
void reverse_states(const BlockOfTile& block, bool constant_B, bool constant_C) {
  const auto reverse = constant_B ? (constant_C ? reverse_states<kComplex, true, true>
                                                : reverse_states<kComplex, true, false>)
                                  : (constant_C ? reverse_states<kComplex, false, true>
                                                : reverse_states<kComplex, false, false>);
  reverse(block);
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
