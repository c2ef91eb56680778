// Elementary functions, in float32 as accurate as the results ask for.
#pragma once

namespace ssmcore::cuda {

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// 2^x to 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log1p(exp(x)) = max(x, 0) + log1p(exp(-|x|)), to a few units in the last place also where the
// result is tiny. Beyond 20 it is x, as softplus is defined.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_approx(-fabsf(x) * kLog2e);
  float y = -0.00853919797f;
  y = y * e + 0.0440895967f;
  y = y * e - 0.107681662f;
  y = y * e + 0.177452385f;
  y = y * e - 0.244954616f;
  y = y * e + 0.332754791f;
  y = y * e - 0.499974042f;
  y = y * e + 0.999999821f;
  return y * e + fmaxf(x, 0.0f);
}

__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal_approx(1.0f + exp2_approx(-x * kLog2e));
}

__device__ __forceinline__ float silu(float x) {
  return x * sigmoid(x);
}

// 1 - exp(-x) for x >= 0, to a few units in the last place also where the result is tiny.
__device__ __forceinline__ float one_minus_exp(float x) {
  const float series = x * (1.0f - x * 0.5f * (1.0f - x * (1.0f / 3) * (1.0f - x * 0.25f)));
  return x < 0.0625f ? series : 1.0f - exp2_approx(-x * kLog2e);
}

// The derivative of silu.
__device__ __forceinline__ float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

// The same in float64, for checking.
__device__ inline double softplus(double x) {
  return x > 20 ? x : log1p(exp(x));
}

__device__ inline double sigmoid(double x) {
  return 1 / (1 + exp(-x));
}

__device__ inline double silu(double x) {
  return x * sigmoid(x);
}

}  // namespace ssmcore::cuda
