// The causal convolution of a few tokens, as in decoding: the states are most of the work.
#include "causal_conv1d_launch.h"
#include "causal_conv1d_state.cuh"

namespace ssmcore::cuda {
namespace {

constexpr int kThreads = 128;

// A thread has a few channels of a row: the inputs before the next stay in registers.
template <typename T, int kChannels, int kWidth>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_update_kernel(const __grid_constant__ CausalConv1dFwdParams p,
                                const __grid_constant__ CausalConv1dFwdPlan plan,
                                uint32_t* faults) {
  constexpr int kHistory = kWidth - 1;
  using Channels = Words<T, kChannels>;
  const int64_t lanes = p.dim / kChannels;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = item / lanes, d = item % lanes * kChannels;
  if (row >= p.rows) return;
  const T* x = static_cast<const T*>(p.x.data) + row * p.x.stride[0] + d * p.x.stride[1];
  T* out = static_cast<T*>(p.out.data) + row * p.out.stride[0] + d * p.out.stride[1];
  const CausalConv1dState<T, kChannels> state(p, plan, row, d, faults);
  Channels window[kWidth];  // the inputs that a step sees, oldest first
#pragma unroll
  for (int k = 0; k < kHistory; ++k) window[k] = state.input(kHistory - k);
  const CausalConv1dTaps<T, kChannels, kWidth> taps(p, plan, d, p.weight_dtype == DType::float32);

  for (int64_t t = 0; t < p.seqlen; ++t) {
    window[kHistory] = load_words<kChannels>(x + t * p.x.stride[2]);
    float sums[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sums[c] = taps.bias[c];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      float inputs[kChannels];
      to_floats(window[k], inputs);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sums[c] = fmaf(taps.weight[k][c], inputs[c], sums[c]);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sums[c] = activate(p, sums[c]);
    store_words(out + t * p.out.stride[2], to_words<T>(sums));
#pragma unroll
    for (int k = 0; k < kHistory; ++k) window[k] = window[k + 1];
  }
  state.update(x, 0, p.seqlen);
  state.check_slot();
}

template <typename T, int kChannels, int kWidth>
void launch(const CausalConv1dFwdParams& p, const Exec& exec) {
  launch_kernel("causal_conv1d", causal_conv1d_update_kernel<T, kChannels, kWidth>,
                {blocks_for(p.rows * (p.dim / kChannels), kThreads), kThreads}, exec, p,
                plan_for(p, kChannels), exec.context.cuda().faults());
}

}  // namespace

bool is_causal_conv1d_update(const CausalConv1dFwdParams& p) {
  return p.seqlen <= kMaxUpdateSteps && p.width <= kMaxVectorWidth && !p.cu_seqlens && !p.seq_idx &&
         (p.initial_state || p.final_state);
}

void launch_causal_conv1d_update(const CausalConv1dFwdParams& p, const Exec& exec) {
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kSize = kVectorSize<T>;
    with_vector_width(p.width, [&](auto width) {
      if (takes_channel_vectors(p, kSize) && plan_for(p, kSize).state_vectors)
        launch<T, kSize, width>(p, exec);
      else
        launch<T, 1, width>(p, exec);
    });
  });
}

}  // namespace ssmcore::cuda
