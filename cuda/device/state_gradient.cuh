// One step of one state in reverse, and forward so that a state computed again has the same bits:
// what is fused is spelled out. Also in float64, for checking.
#pragma once

#include "state.cuh"

namespace ssmcore::cuda {

__device__ __forceinline__ double rate_of(double A) {
  return A;
}
__device__ __forceinline__ double decay(double delta, double rate) {
  return exp(delta * rate);
}
__device__ __forceinline__ double real_product(double C, double h) {
  return C * h;
}

// v + x w for real x.
template <typename Real>
__device__ __forceinline__ Real add_scaled(Real v, Real x, Real w) {
  return fma(x, w, v);
}
__device__ __forceinline__ float2 add_scaled(float2 v, float x, float2 w) {
  return {fmaf(x, w.x, v.x), fmaf(x, w.y, v.y)};
}

// v + x w̄ for real x.
template <typename Real>
__device__ __forceinline__ Real add_scaled_conjugate(Real v, Real x, Real w) {
  return fma(x, w, v);
}
__device__ __forceinline__ float2 add_scaled_conjugate(float2 v, float x, float2 w) {
  return {fmaf(x, w.x, v.x), fmaf(-x, w.y, v.y)};
}

// a h + x B for real x.
template <typename Real>
__device__ __forceinline__ Real advance_again(Real a, Real h, Real x, Real B) {
  return fma(a, h, x * B);
}
__device__ __forceinline__ float2 advance_again(float2 a, float2 h, float x, float2 B) {
  return {fmaf(a.x, h.x, fmaf(-a.y, h.y, x * B.x)), fmaf(a.x, h.y, fmaf(a.y, h.x, x * B.y))};
}

// v̄ w
template <typename Real>
__device__ __forceinline__ Real conjugate_product(Real v, Real w) {
  return v * w;
}
__device__ __forceinline__ float2 conjugate_product(float2 v, float2 w) {
  return {fmaf(v.x, w.x, v.y * w.y), fmaf(v.x, w.y, -v.y * w.x)};
}

// sum + Re(v̄ w)
template <typename Real>
__device__ __forceinline__ Real add_inner(Real sum, Real v, Real w) {
  return fma(v, w, sum);
}
__device__ __forceinline__ float add_inner(float sum, float2 v, float2 w) {
  return fmaf(v.x, w.x, fmaf(v.y, w.y, sum));
}

}  // namespace ssmcore::cuda
