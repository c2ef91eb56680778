// Elementary functions in float32, as accurate as the results ask for.
#pragma once

namespace ssmcore::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// 2^x to 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x > 20 ? x : log1p(exp(x)), to a few units in the last place also where the result is tiny:
// log1p(e) = e - e²/2 + e³/3 - … for small e, where 1 + e would lose it.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_approx(x * kLog2e);
  const float large = kLn2 * log2_approx(1.0f + e);
  const float small = e * (1.0f + e * (-0.5f + e * (1.0f / 3 + e * (-0.25f + e * 0.2f))));
  return x > 20.0f ? x : (e < 0.0625f ? small : large);
}

__device__ __forceinline__ float silu(float x) {
  return x * reciprocal_approx(1.0f + exp2_approx(-x * kLog2e));
}

}  // namespace ssmcore::cuda
