// What the kernels for one token through a whole Mamba layer share, for few rows and for more.
#pragma once

#include "../cpp/src/mamba_step_params.h"
#include "device/dependent_launch.cuh"
#include "device/math.cuh"
#include "device/types.cuh"
#include "ssmcore/context.h"

namespace ssmcore::cuda {

inline constexpr int kWidth = MambaStepParams::kWidth, kDstate = MambaStepParams::kDstate;

// Rows up to 4; more, of 16-bit types, which go through the tensor cores; and what both have in
// common: dt_proj, state update and gate.
void launch_mamba_step_few_rows(const MambaStepParams& p, const Exec& exec);
void launch_mamba_step_rows(const MambaStepParams& p, const Exec& exec);
void launch_mamba_step_update(const MambaStepParams& p, const Exec& exec);

template <typename T>
__device__ __forceinline__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

__device__ __forceinline__ int64_t slot_of(const MambaStepParams& p, int row) {
  const int64_t slot = p.state_indices[row];
  return slot < p.slots ? slot : -1;
}

// One channel of the convolution at one row: what it needs besides the input, loaded ahead.
template <typename T>
struct Convolution {
  T* state = nullptr;  // of this channel; null where there is nothing to update
  T history[kWidth - 1] = {};
  float weight[kWidth], bias;

  __device__ Convolution() {}
  __device__ Convolution(const MambaStepParams& p, int row, int d) {
    const int64_t slot = slot_of(p, row);
    if (slot >= 0) {
      state = static_cast<T*>(p.conv_state) + slot * p.conv_state_stride + d;
#pragma unroll
      for (int k = 0; k < kWidth - 1; ++k) history[k] = state[k * p.dim];
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) weight[k] = p.conv_weight[k * p.dim + d];
    bias = p.conv_bias ? p.conv_bias[d] : 0.0f;
  }

  __device__ float next(const MambaStepParams& p, T x) const {
    float sum = bias;
#pragma unroll
    for (int k = 0; k < kWidth - 1; ++k) sum = fmaf(weight[k], to_float(history[k]), sum);
    sum = fmaf(weight[kWidth - 1], to_float(x), sum);
    if (state) {
#pragma unroll
      for (int k = 0; k < kWidth - 2; ++k) state[k * p.dim] = history[k + 1];
      state[(kWidth - 2) * p.dim] = x;
    }
    return silu(sum);
  }
};

}  // namespace ssmcore::cuda
