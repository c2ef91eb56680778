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

// N neighbouring weights, of T or float32, as they are in memory: so loads run ahead of what waits
// for others.
template <typename T, int N>
struct CausalConv1dWeights {
  uint32_t words[N];  // 16-bit values two a word, a single one in the lower half

  __device__ __forceinline__ void load(const void* data, bool is_float32, int64_t at) {
    if (is_float32)
      load(static_cast<const float*>(data) + at);
    else
      load(static_cast<const T*>(data) + at);
  }
  __device__ __forceinline__ float value(bool is_float32, int i) const {
    if (sizeof(T) == 4 || is_float32) return __uint_as_float(words[i]);
    const auto half = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    return to_float(reinterpret_cast<const T&>(half));
  }

 private:
  template <typename W>
  __device__ __forceinline__ void load(const W* from) {
    // As many as `at`, a multiple of N, lets be aligned.
    constexpr int kAligned = N & -N, kStep = kAligned < kVectorSize<W> ? kAligned : kVectorSize<W>;
    constexpr int kCount = Words<W, kStep>::kCount;
#pragma unroll
    for (int i = 0; i < N / kStep; ++i) {
      const auto some = load_words<kStep>(from + i * kStep);
#pragma unroll
      for (int j = 0; j < kCount; ++j) words[i * kCount + j] = some.words.value[j];
    }
  }
};

// The weights of kChannels channels: kWidth taps, of which the first may be missing if kWidth is
// kMaxConvWidth. More than one channel takes vectors.
template <typename T, int kChannels, int kWidth>
struct CausalConv1dTaps {
  float weight[kWidth][kChannels], bias[kChannels];

  static __device__ __forceinline__ int missing(const CausalConv1dFwdParams& p) {
    return kWidth == kMaxConvWidth ? kWidth - static_cast<int>(p.width) : 0;
  }

  // is_float32: the weight, as opposed to the bias, which has a type of its own.
  __device__ __forceinline__ CausalConv1dTaps(const CausalConv1dFwdParams& p,
                                              const CausalConv1dFwdPlan& plan, int64_t d,
                                              bool is_float32) {
    if constexpr (kChannels > 1)
      if (!plan.weight_vectors) load_by_channel(p, d, is_float32);
    if (kChannels == 1 || plan.weight_vectors) load_by_tap(p, d, is_float32);
  }

 private:
  using Channels = CausalConv1dWeights<T, kChannels>;

  static __device__ __forceinline__ Channels load_bias(const CausalConv1dFwdParams& p, int64_t d) {
    Channels biases{};
    if (p.bias.data) biases.load(p.bias.data, p.bias_dtype == DType::float32, d * p.bias.stride[0]);
    return biases;
  }
  __device__ __forceinline__ void set_bias(const CausalConv1dFwdParams& p, const Channels& biases) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) bias[i] = biases.value(p.bias_dtype == DType::float32, i);
  }

  __device__ __forceinline__ void load_by_channel(const CausalConv1dFwdParams& p, int64_t d,
                                                  bool is_float32) {
    CausalConv1dWeights<T, kChannels * kWidth> rows;
    rows.load(p.weight.data, is_float32, d * p.weight.stride[0]);
    const Channels biases = load_bias(p, d);
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
#pragma unroll
      for (int i = 0; i < kChannels; ++i) weight[k][i] = rows.value(is_float32, i * kWidth + k);
    set_bias(p, biases);
  }

  __device__ __forceinline__ void load_by_tap(const CausalConv1dFwdParams& p, int64_t d,
                                              bool is_float32) {
    Channels taps[kWidth] = {};
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      if (k >= missing(p))
        taps[k].load(p.weight.data, is_float32,
                     d * p.weight.stride[0] + (k - missing(p)) * p.weight.stride[1]);
    const Channels biases = load_bias(p, d);
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
#pragma unroll
      for (int i = 0; i < kChannels; ++i) weight[k][i] = taps[k].value(is_float32, i);
    set_bias(p, biases);
  }
};

__device__ __forceinline__ float activate(const CausalConv1dFwdParams& p, float sum) {
  return p.activation == Activation::silu ? silu(sum) : sum;
}

}  // namespace ssmcore::cuda
