// For the launchers of the causal convolution: how a call lies in memory.
#pragma once

#include "causal_conv1d_taps.cuh"
#include "launch.h"

namespace ssmcore::cuda {

// The widest that kernels of vectors take.
inline constexpr int64_t kMaxVectorWidth = 4;
// Steps up to which a call is an update of the states rather than a sequence.
inline constexpr int64_t kMaxUpdateSteps = 8;

// Whether this is such a call.
bool is_causal_conv1d_update(const CausalConv1dFwdParams& p);
void launch_causal_conv1d_update(const CausalConv1dFwdParams& p, const Exec& exec);

template <typename Function>
void with_vector_width(int64_t width, const Function& function) {
  if (width == 2)
    function(std::integral_constant<int, 2>());
  else if (width == 3)
    function(std::integral_constant<int, 3>());
  else
    function(std::integral_constant<int, 4>());
}

// Whether what is contiguous can be read in vectors of `size` elements, everything else being
// strides of it.
template <typename... Strides>
bool has_vectors(const void* data, DType dtype, int64_t size, Strides... strides) {
  const size_t bytes = dtype_size(dtype) * static_cast<size_t>(size);
  return is_aligned(data, std::min<size_t>(bytes, 16)) && ((strides % size == 0) && ...);
}

// The same of the channels of x, out or a state.
inline bool has_channel_vectors(const Strided<3>& tensor, DType dtype, int64_t size) {
  return !tensor || (tensor.stride[1] == 1 &&
                     has_vectors(tensor.data, dtype, size, tensor.stride[0], tensor.stride[2]));
}

// Whether threads can take `channels` each, up to the states.
inline bool takes_channel_vectors(const CausalConv1dFwdParams& p, int64_t channels) {
  const bool weight_rows = p.weight.stride[1] == 1 && p.weight.stride[0] == p.width;
  const bool weight_vectors = p.weight.stride[0] == 1 && p.weight.stride[1] % channels == 0;
  return p.width <= kMaxVectorWidth && p.dim % channels == 0 &&
         has_channel_vectors(p.x, p.dtype, channels) &&
         has_channel_vectors(p.out, p.dtype, channels) && (weight_rows || weight_vectors) &&
         has_vectors(p.weight.data, p.weight_dtype, channels) &&
         (!p.bias || (p.bias.stride[0] == 1 && has_vectors(p.bias.data, p.bias_dtype, channels)));
}

// The vectors, aligned, that hold the steps of a row.
inline int64_t step_vectors(const CausalConv1dFwdParams& p, int64_t size) {
  const bool aligned = has_vectors(p.x.data, p.dtype, size, p.x.stride[0], p.x.stride[1]);
  return ceil_div(p.seqlen + (aligned ? 0 : size - 1), size);
}

inline CausalConv1dFwdPlan plan_for(const CausalConv1dFwdParams& p, int64_t channels) {
  CausalConv1dFwdPlan plan{};
  plan.batch = p.cu_seqlens ? 1 : p.rows;
  plan.weight_vectors = p.weight.stride[0] == 1 && p.weight.stride[1] % channels == 0;
  plan.state_vectors = channels == 1 || (has_channel_vectors(p.initial_state, p.dtype, channels) &&
                                         has_channel_vectors(p.final_state, p.dtype, channels));
  return plan;
}

}  // namespace ssmcore::cuda
