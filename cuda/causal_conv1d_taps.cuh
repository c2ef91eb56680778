// What the kernels of the causal convolution share: how a call lies in memory, and the taps of a
// thread's channels.
#pragma once

#include "../cpp/src/causal_conv1d_params.h"
#include "device/fault.cuh"
#include "device/math.cuh"
#include "device/words.cuh"

namespace ssmcore::cuda {

// What the launcher knows of the layout of a call. Vectors are of a thread's channels.
struct CausalConv1dFwdPlan {
  int64_t batch;
  int64_t block_l, tiles;  // steps of a tile, and tiles of seqlen
  bool steps_first;     // neighbouring threads have tiles of one channel, not one tile's channels
  bool weight_vectors;  // weight is read by vectors tap by tap, else channel by channel
  bool state_vectors;   // the states can be read by vectors
};

// N contiguous values, 16 bytes at a time.
template <typename T, int N>
__device__ __forceinline__ void load_floats(const T* from, float (&to)[N]) {
  constexpr int kStep = N < kVectorSize<T> ? N : kVectorSize<T>;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    float some[kStep];
    to_floats(load_words<kStep>(from + i), some);
#pragma unroll
    for (int j = 0; j < kStep; ++j) to[i + j] = some[j];
  }
}

// The weights of kChannels channels: kWidth taps, of which the first may be missing if kWidth is
// kMaxConvWidth. More than one channel takes vectors.
template <typename T, int kChannels, int kWidth>
struct CausalConv1dTaps {
  float weight[kWidth][kChannels], bias[kChannels];

  static __device__ __forceinline__ int missing(const CausalConv1dFwdParams& p) {
    return kWidth == kMaxConvWidth ? kWidth - static_cast<int>(p.width) : 0;
  }

  __device__ __forceinline__ CausalConv1dTaps(const CausalConv1dFwdParams& p,
                                              const CausalConv1dFwdPlan& plan, int64_t d) {
    if (p.weight_dtype == DType::float32)
      load_weight(p, plan, static_cast<const float*>(p.weight.data) + d * p.weight.stride[0]);
    else
      load_weight(p, plan, static_cast<const T*>(p.weight.data) + d * p.weight.stride[0]);
#pragma unroll
    for (float& b : bias) b = 0.0f;
    if (!p.bias.data) return;
    if (p.bias_dtype == DType::float32)
      load_floats(static_cast<const float*>(p.bias.data) + d * p.bias.stride[0], bias);
    else
      load_floats(static_cast<const T*>(p.bias.data) + d * p.bias.stride[0], bias);
  }

 private:
  template <typename W>
  __device__ __forceinline__ void load_weight(const CausalConv1dFwdParams& p,
                                              const CausalConv1dFwdPlan& plan, const W* from) {
    if constexpr (kChannels == 1) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        weight[k][0] =
            k < missing(p) ? 0.0f : to_float(from[(k - missing(p)) * p.weight.stride[1]]);
    } else if (plan.weight_vectors) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) load_floats(from + k * p.weight.stride[1], weight[k]);
    } else {
      float rows[kChannels * kWidth];
      load_floats(from, rows);
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
#pragma unroll
        for (int i = 0; i < kChannels; ++i) weight[k][i] = rows[i * kWidth + k];
    }
  }
};

__device__ __forceinline__ float activate(const CausalConv1dFwdParams& p, float sum) {
  return p.activation == Activation::silu ? silu(sum) : sum;
}

}  // namespace ssmcore::cuda
