// The states of the causal convolution: the inputs before a sequence, and those that it leaves.
#pragma once

#include "causal_conv1d_taps.cuh"

namespace ssmcore::cuda {

// The slot that the sequence `row` has its states in; -1: none. `faults`: where to report one that
// is not there.
__device__ __forceinline__ int64_t state_slot(const CausalConv1dFwdParams& p, int64_t row,
                                              uint32_t* faults) {
  if (!p.state_indices.data) return row;
  const int64_t slot =
      static_cast<const int32_t*>(p.state_indices.data)[row * p.state_indices.stride[0]];
  if (slot >= p.slots) report(faults, Fault::causal_conv1d_state_indices);
  return slot < p.slots ? max(slot, int64_t{-1}) : -1;
}

// Reports a slot that two sequences have. For the threads of channel `lane` of `lanes`, of which
// one each comes for every row.
__device__ __forceinline__ void check_state_slot(const CausalConv1dFwdParams& p, int64_t row,
                                                 int64_t lane, int64_t lanes, uint32_t* faults) {
  if (p.state_indices.data)
    report_shared_slot(static_cast<const int32_t*>(p.state_indices.data), p.state_indices.stride[0],
                       row, lane, lanes, faults, Fault::causal_conv1d_shared_slot);
}

// Of kChannels channels from d on, for the sequence `row`.
template <typename T, int kChannels>
class CausalConv1dState {
 public:
  using Channels = Words<T, kChannels>;

  __device__ __forceinline__ CausalConv1dState(const CausalConv1dFwdParams& p,
                                               const CausalConv1dFwdPlan& plan, int64_t row,
                                               int64_t d, uint32_t* faults)
      : p(p), plan(plan), row(row), d(d), faults(faults) {
    if (!p.initial_state.data && !p.final_state.data) return;
    const int64_t slot = state_slot(p, row, faults);
    if (slot < 0) return;
    if (p.initial_state.data)
      initial = static_cast<const T*>(p.initial_state.data) + slot * p.initial_state.stride[0] +
                d * p.initial_state.stride[1];
    if (p.final_state.data)
      final = static_cast<T*>(p.final_state.data) + slot * p.final_state.stride[0] +
              d * p.final_state.stride[1];
    if (!p.cache_seqlens.data) return;
    const int32_t seen =
        static_cast<const int32_t*>(p.cache_seqlens.data)[row * p.cache_seqlens.stride[0]];
    if (seen < 0) report(faults, Fault::causal_conv1d_cache_seqlens);
    next = max(seen, 0) % p.state_len;
  }

  // For the threads that update the states of a row.
  __device__ __forceinline__ void check_slot() const {
    check_state_slot(p, row, d / kChannels, p.dim / kChannels, faults);
  }

  // The input `back` steps before the first: 1 to width - 1.
  __device__ __forceinline__ Channels input(int back) const {
    if (!initial) return {};
    const int64_t place = (p.cache_seqlens.data ? next : p.state_len) - back;
    return load(initial, p.initial_state, place < 0 ? place + p.state_len : place);
  }

  // Leaves what follows from inputs [begin, end) of x, which are these channels' of the sequence.
  __device__ __forceinline__ void update(const T* x, int64_t begin, int64_t end) const {
    if (!final) return;
    if (p.cache_seqlens.data)
      update_circular(x, begin, end);
    else
      update_shifted(x, begin, end);
  }

 private:
  // The last state_len of (initial, x). Where the two states share their memory, what is written
  // has been read before.
  __device__ __forceinline__ void update_shifted(const T* x, int64_t begin, int64_t end) const {
    constexpr int kBatch = 4;
    for (int64_t place = 0; place < p.state_len; place += kBatch) {
      Channels entry[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t t = end - p.state_len + place + i;
        if (place + i >= p.state_len) continue;
        if (t >= begin)
          entry[i] = load_words<kChannels>(x + t * p.x.stride[2]);
        else if (initial)
          entry[i] = load(initial, p.initial_state, t - begin + p.state_len);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (place + i < p.state_len) store(place + i, entry[i]);
    }
  }

  __device__ __forceinline__ void update_circular(const T* x, int64_t begin, int64_t end) const {
    int64_t t = max(begin, end - p.state_len);
    int64_t place = (next + t - begin) % p.state_len;
    for (; t < end; ++t) {
      store(place, load_words<kChannels>(x + t * p.x.stride[2]));
      if (++place == p.state_len) place = 0;
    }
  }

  __device__ __forceinline__ Channels load(const T* from, const Strided<3>& states,
                                           int64_t place) const {
    from += place * states.stride[2];
    if (plan.state_vectors) return load_words<kChannels>(from);
    float values[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) values[i] = to_float(from[i * states.stride[1]]);
    return to_words<T>(values);
  }

  __device__ __forceinline__ void store(int64_t place, const Channels& entry) const {
    T* to = final + place * p.final_state.stride[2];
    if (plan.state_vectors) return store_words(to, entry);
    float values[kChannels];
    to_floats(entry, values);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) to[i * p.final_state.stride[1]] = from_float<T>(values[i]);
  }

  const CausalConv1dFwdParams& p;
  const CausalConv1dFwdPlan& plan;
  int64_t row, d;
  uint32_t* faults;
  const T* initial = nullptr;  // null: zeros
  T* final = nullptr;          // null: not wanted
  int64_t next = 0;            // where a circular state has the next input
};

}  // namespace ssmcore::cuda
