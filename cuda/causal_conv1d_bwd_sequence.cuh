// Where the gradients of a sequence's inputs go: those of its steps to dx, those of the inputs
// before it to dinitial_state, and what its final state kept of either adds its own.
#pragma once

#include "causal_conv1d_state.cuh"

namespace ssmcore::cuda {

// Element `at` of a gradient, of float32 or of T.
template <typename T, int Rank>
__device__ __forceinline__ void put_gradient(const StridedGradient<Rank>& gradient, int64_t at,
                                             float value) {
  const auto put = [&](auto* to) {
    using G = std::remove_pointer_t<decltype(to)>;
    *to = from_float<G>(gradient.accumulate ? value + to_float(*to) : value);
  };
  if (gradient.dtype == DType::float32)
    put(static_cast<float*>(gradient.data) + at);
  else
    put(static_cast<T*>(gradient.data) + at);
}

// Steps [begin, end) of a row of the batch. Inputs before the first have steps before `begin`.
template <typename T>
class CausalConv1dSequence {
 public:
  const int64_t begin, end;

  __device__ __forceinline__ CausalConv1dSequence(const CausalConv1dBwdParams& p, int64_t batch,
                                                  int64_t row, int64_t begin, int64_t end,
                                                  uint32_t* faults)
      : begin(begin),
        end(end),
        p(p),
        batch(batch),
        slot(p.fwd.slots > 0 ? state_slot(p.fwd, row, faults) : -1) {}

  // The first step that the final state kept.
  __device__ __forceinline__ int64_t first_kept() const {
    return slot >= 0 && p.dfinal_state.data ? end - p.fwd.state_len : INT64_MAX;
  }

  // Input t of channel d has the gradient `value`, besides what comes through the final state.
  __device__ __forceinline__ void put(int64_t t, int64_t d, float value) const {
    if (t >= first_kept())
      value += to_float(static_cast<const T*>(
          p.dfinal_state.data)[slot * p.dfinal_state.stride[0] + d * p.dfinal_state.stride[1] +
                               (t - first_kept()) * p.dfinal_state.stride[2]]);
    if (t >= begin && p.dx.data)
      put_gradient<T>(p.dx, batch * p.dx.stride[0] + d * p.dx.stride[1] + t * p.dx.stride[2],
                      value);
    if (t < begin && slot >= 0 && p.dinitial_state.data)
      put_gradient<T>(p.dinitial_state,
                      slot * p.dinitial_state.stride[0] + d * p.dinitial_state.stride[1] +
                          (t - begin + p.fwd.state_len) * p.dinitial_state.stride[2],
                      value);
  }

  // Those of the initial state that no step sees.
  __device__ void put_unseen(int64_t d, int channels) const {
    if (slot < 0 || !p.dinitial_state.data) return;
    for (int64_t t = begin - p.fwd.state_len; t < begin - (p.fwd.width - 1); ++t)
      for (int c = 0; c < channels; ++c) put(t, d + c, 0.0f);
  }

 private:
  const CausalConv1dBwdParams& p;
  const int64_t batch, slot;  // slot -1: no states
};

}  // namespace ssmcore::cuda
