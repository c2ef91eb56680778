// The recurrence of one state, real or complex (a float2 of real and imaginary part).
#pragma once

#include <type_traits>

#include "math.cuh"

namespace ssmcore::cuda {

template <bool kComplex>
using State = std::conditional_t<kComplex, float2, float>;

// The sine and cosine of `quarters` + f quarter turns, |f| ≤ ½. Polynomials are minimax fits of
// relative error below 4e-9.
__device__ __forceinline__ void sincos_quarters(int quarters, float f, float* sine, float* cosine) {
  const float f2 = f * f;
  float s = f2 * -4.601657732e-03f + 7.968003271e-02f;
  s = s * f2 - 6.459634602e-01f;
  s = s * f2 + 1.570796322f;
  s *= f;
  float c = f2 * 9.040216595e-04f - 2.086028850e-02f;
  c = c * f2 + 2.536692440e-01f;
  c = c * f2 - 1.233700543f;
  c = c * f2 + 1.0f;
  const bool odd = quarters & 1;
  const float sin_rest = odd ? c : s, cos_rest = odd ? s : c;
  *sine = __int_as_float(__float_as_int(sin_rest) ^ (quarters << 30 & 0x80000000));
  *cosine = __int_as_float(__float_as_int(cos_rest) ^ ((quarters + 1) << 30 & 0x80000000));
}

// A in the units of decay(): log2(e) is folded in, and 2/π into the imaginary part, of which `rest`
// holds what rounding lost.
struct ComplexRate {
  float real, imaginary, rest;
};
template <bool kComplex>
using Rate = std::conditional_t<kComplex, ComplexRate, float>;

__device__ __forceinline__ float rate_of(float A) {
  return A * kLog2e;
}
__device__ __forceinline__ ComplexRate rate_of(float2 A) {
  constexpr double kQuartersPerRadian = 0.63661977236758134;
  constexpr float kHigh = static_cast<float>(kQuartersPerRadian);
  constexpr float kLow = static_cast<float>(kQuartersPerRadian - kHigh);
  const float imaginary = A.y * kHigh;
  return {A.x * kLog2e, imaginary, __fmaf_rn(A.y, kHigh, -imaginary) + A.y * kLow};
}

// exp(Δ A). The angle is reduced to half a quarter turn at most before it is rounded.
__device__ __forceinline__ float decay(float delta, float rate) {
  return exp2_approx(delta * rate);
}
__device__ __forceinline__ float2 decay(float delta, const ComplexRate& rate) {
  constexpr float kMagic = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  const float shifted = __fmaf_rn(delta, rate.imaginary, kMagic);
  const float rest = __fmaf_rn(delta, rate.imaginary, -(shifted - kMagic));
  float sine, cosine;
  sincos_quarters(__float_as_int(shifted), __fmaf_rn(delta, rate.rest, rest), &sine, &cosine);
  const float modulus = exp2_approx(delta * rate.real);
  return {modulus * cosine, modulus * sine};
}

// a h + x B for real x.
__device__ __forceinline__ float advance(float a, float h, float x, float B) {
  return a * h + x * B;
}
__device__ __forceinline__ float2 advance(float2 a, float2 h, float x, float2 B) {
  return {a.x * h.x - a.y * h.y + x * B.x, a.x * h.y + a.y * h.x + x * B.y};
}

// Re(C h)
__device__ __forceinline__ float real_product(float C, float h) {
  return C * h;
}
__device__ __forceinline__ float real_product(float2 C, float2 h) {
  return C.x * h.x - C.y * h.y;
}

}  // namespace ssmcore::cuda
