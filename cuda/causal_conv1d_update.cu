// The causal convolution of a few tokens, as in decoding: the states are most of the work.
#include "causal_conv1d_launch.h"

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
  const int64_t slot = slot_of(p, row, faults);
  const T* initial = nullptr;
  T* final = nullptr;
  if (slot >= 0 && p.initial_state.data)
    initial = static_cast<const T*>(p.initial_state.data) + slot * p.initial_state.stride[0] +
              d * p.initial_state.stride[1];
  if (slot >= 0 && p.final_state.data)
    final = static_cast<T*>(p.final_state.data) + slot * p.final_state.stride[0] +
            d * p.final_state.stride[1];
  const bool circular = p.cache_seqlens.data;
  const int64_t next = circular ? next_place(p, row, faults) : p.state_len;

  Channels window[kWidth] = {};  // the inputs that a step sees, oldest first
  if (initial)
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
      const int64_t place = next - kHistory + k;
      window[k] = load_words<kChannels>(
          initial + (place < 0 ? place + p.state_len : place) * p.initial_state.stride[2]);
    }
  const CausalConv1dTaps<T, kChannels, kWidth> taps(p, plan, d);

  int64_t place = next;  // of the next input, in a circular state
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
    if (circular && final) {
      store_words(final + place * p.final_state.stride[2], window[kHistory]);
      if (++place == p.state_len) place = 0;
    }
#pragma unroll
    for (int k = 0; k < kHistory; ++k) window[k] = window[k + 1];
  }
  if (circular || !final) return;
  // What the window does not hold moves; in place that is safe in this order.
  for (int64_t i = 0; i < p.state_len - kHistory; ++i) {
    const int64_t from = i + p.seqlen;
    Channels entry{};
    if (from >= p.state_len)
      entry = load_words<kChannels>(x + (from - p.state_len) * p.x.stride[2]);
    else if (initial)
      entry = load_words<kChannels>(initial + from * p.initial_state.stride[2]);
    store_words(final + i * p.final_state.stride[2], entry);
  }
#pragma unroll
  for (int k = 0; k < kHistory; ++k)
    store_words(final + (p.state_len - kHistory + k) * p.final_state.stride[2], window[k]);
}

template <typename T, int kChannels, int kWidth>
void launch(const CausalConv1dFwdParams& p, const Exec& exec) {
  launch_kernel("causal_conv1d", causal_conv1d_update_kernel<T, kChannels, kWidth>,
                {blocks_for(p.rows * (p.dim / kChannels), kThreads), kThreads}, exec, p,
                plan_for(p, kChannels), exec.context.cuda().faults());
}

}  // namespace

bool is_causal_conv1d_update(const CausalConv1dFwdParams& p) {
  return p.seqlen <= kMaxUpdateSteps && p.width <= kMaxVectorWidth && !p.cu_seqlens &&
         !p.seq_idx && (p.initial_state || p.final_state);
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
