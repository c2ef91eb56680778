// Elementary functions of a Vec, accurate to about 1 unit in the last place (softplus and SiLU: a
// few). Polynomials are minimax fits of relative error below 2e-9.
#pragma once

#include "vec.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr float kLn2 = 0.693147180559945309f;
inline constexpr float kTurnsPerRadian = 0.159154943091895336f;

// 2^x. Exactly 1 at 0, so that a state under Δ = 0 stays as it is.
SSMCORE_INLINE Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  const __m512 integer = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const Vec in_range =
      select(x < -126.0f, broadcast(-126.0f), select(x > 127.0f, broadcast(127.0f), x));
  const Vec magic = broadcast(0x1.8p23f);  // adding it rounds to an integer in the low bits
  const Vec shifted = in_range + magic;
  const Vec f = in_range - (shifted - magic);
#endif
  Vec p = f * 1.535336203e-04f + 1.339887465e-03f;
  p = p * f + 9.618437359e-03f;
  p = p * f + 5.550332471e-02f;
  p = p * f + 2.402264791e-01f;
  p = p * f + 6.931472029e-01f;
  p = p * f + 1.0f;
#if defined(__AVX512DQ__)
  return (Vec)_mm512_scalef_ps((__m512)p, integer);
#else
  const IntVec exponent = bit_cast<IntVec>(shifted) - 0x4b400000 + 127;
  p *= bit_cast<Vec>(exponent << 23);
  p = select(x < -126.0f, Vec{}, p);
  return select(x >= 128.0f, broadcast(__builtin_inff()), p);
#endif
}

// e^x for moderate x: the product with log2(e) is rounded, an error of 6e-8 |x|.
SSMCORE_INLINE Vec exp(Vec x) {
  return exp2(x * kLog2e);
}

// log(x) for finite x > 0, not subnormal: x = 2^k m with m in [√½, √2), and log m = 2 atanh(s),
// s = (m - 1) / (m + 1).
SSMCORE_INLINE Vec log(Vec x) {
  const IntVec bits = bit_cast<IntVec>(x);
  const IntVec exponent = (bits - 0x3f3504f3) >> 23;
  const Vec m = bit_cast<Vec>(bits - (exponent << 23));
  const Vec s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  Vec p = s2 * 1.493654334e-01f + 1.998874756e-01f;
  p = p * s2 + 3.333338836e-01f;
  const Vec log_m = 2.0f * s + 2.0f * s * s2 * p;
  return __builtin_convertvector(exponent, Vec) * kLn2 + log_m;
}

// x > 20 ? x : log(1 + e^x), the published threshold. Where 1 + e^x is rounded, the logarithm is
// corrected by the ratio of e^x to what was added (Kahan), so nothing cancels for very negative x.
SSMCORE_INLINE Vec softplus(Vec x) {
  const Vec e = exp(select(x > 20.0f, broadcast(20.0f), x));
  const Vec sum = 1.0f + e;
  const Vec added = sum - 1.0f;
  const Vec log_sum = select(added == 0.0f, e, log(sum) * (e / added));
  return select(x > 20.0f, x, log_sum);
}

SSMCORE_INLINE Vec sigmoid(Vec x) {
  return 1.0f / (1.0f + exp(-x));
}

SSMCORE_INLINE Vec silu(Vec x) {
  return x / (1.0f + exp(-x));
}

// The derivative of SiLU.
SSMCORE_INLINE Vec silu_slope(Vec x) {
  const Vec s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// The sine and cosine of an angle in turns. Polynomials cover a quarter turn to either side; what
// is beyond is mirrored there.
SSMCORE_INLINE void sincos_turns(Vec turns, Vec* sine, Vec* cosine) {
  const Vec magic = broadcast(0x1.8p23f);  // adding it rounds to an integer in the low bits
  const Vec r = turns - ((turns + magic) - magic);
  const IntVec far = (r > 0.25f) | (r < -0.25f);
  const Vec mirrored = select(r > 0.0f, 0.5f - r, -0.5f - r);
  const Vec x = select(far, mirrored, r), x2 = x * x;
  Vec p = x2 * 3.953664222e+01f - 7.654977436e+01f;
  p = p * x2 + 8.160100375e+01f;
  p = p * x2 - 4.134165503e+01f;
  p = p * x2 + 6.283185160e+00f;
  *sine = x * p;
  Vec q = x2 * -2.500676595e+01f + 6.014820077e+01f;
  q = q * x2 - 8.545383052e+01f;
  q = q * x2 + 6.493935359e+01f;
  q = q * x2 - 1.973920862e+01f;
  q = q * x2 + 1.0f;
  *cosine = select(far, -q, q);
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
