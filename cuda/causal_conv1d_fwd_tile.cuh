// The causal convolution of a few channels over a tile of steps, by one thread: a window slides over
// the inputs. Here is also where sequences begin and end, and what they leave as their states.
#pragma once

#include "../cpp/src/causal_conv1d_params.h"
#include "device/fault.cuh"
#include "device/math.cuh"
#include "device/types.cuh"

namespace ssmcore::cuda {

// What the launcher knows of the layout of a call. Vectors are of a thread's channels.
struct CausalConv1dFwdPlan {
  int64_t batch;
  int64_t block_l, tiles;  // steps of a tile, and tiles of seqlen
  bool steps_first;        // neighbouring threads have tiles of one channel, not one tile's channels
  bool weight_vectors;     // weight can be read by vectors, tap by tap,
  bool weight_rows;        // or all taps of a thread's channels in a row
  bool bias_vectors;
  bool state_vectors;
};

// N contiguous values, 16 bytes at a time; N = 1 needs no alignment.
template <typename T, int N>
__device__ __forceinline__ void load_floats(const T* from, float (&to)[N]) {
  constexpr int kStep = N < kVectorSize<T> ? N : kVectorSize<T>;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    const Vector<T, kStep> vector = load_vector<kStep>(from + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) to[i + j] = to_float(vector.value[j]);
  }
}

// Element `at` of a parameter, of x's dtype or float32.
template <typename T>
__device__ __forceinline__ float load_either(const void* from, DType dtype, int64_t at) {
  return dtype == DType::float32 ? static_cast<const float*>(from)[at]
                                 : to_float(static_cast<const T*>(from)[at]);
}

// Packed sequences, where they are clamped to the steps that there are.
struct PackedRows {
  const CausalConv1dFwdParams& p;

  // Where a sequence begins, and the one before ends.
  __device__ int64_t boundary(int64_t row) const {
    const int64_t at = static_cast<const int32_t*>(p.cu_seqlens.data)[row * p.cu_seqlens.stride[0]];
    return min(max(at, int64_t{0}), p.seqlen);
  }
  // The first sequence that begins at step t or after.
  __device__ int64_t first_from(int64_t t) const {
    int64_t low = 0, high = p.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (boundary(middle) < t)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// kWidth is the width, or, if kMaxConvWidth, at least that: taps that there are not come first.
template <typename T, int kChannels, int kWidth, int kMaxUnroll = CONV_UNROLL>
class CausalConv1dTile {
 public:
  // Channels [d, d + kChannels) of a row of the batch.
  __device__ CausalConv1dTile(const CausalConv1dFwdParams& p, const CausalConv1dFwdPlan& plan,
                              uint32_t* faults, int64_t batch, int64_t d)
      : p(p), plan(plan), faults(faults), batch(batch), d(d) {
    x = static_cast<const T*>(p.x.data) + batch * p.x.stride[0] + d * p.x.stride[1];
    out = static_cast<T*>(p.out.data) + batch * p.out.stride[0] + d * p.out.stride[1];
    if (p.seq_idx.data)
      numbers = static_cast<const int32_t*>(p.seq_idx.data) + batch * p.seq_idx.stride[0];
    if (p.weight_dtype == DType::float32)
      load_weight(static_cast<const float*>(p.weight.data));
    else
      load_weight(static_cast<const T*>(p.weight.data));
    if (!p.bias.data)
      for (float& b : bias) b = 0.0f;
    else if (p.bias_dtype == DType::float32)
      load_bias(static_cast<const float*>(p.bias.data));
    else
      load_bias(static_cast<const T*>(p.bias.data));
  }

  // out at steps [begin, end), and the states of the sequences that begin there. Who has the first
  // step of a sequence does its first width - 1, wherever they lie, so that nobody else reads its
  // initial state, whose memory the final one may share.
  __device__ __forceinline__ void run(int64_t begin, int64_t end) {
    const PackedRows rows{p};
    const bool packed = p.cu_seqlens.data;
    // The sequence that `begin` is in, if not the first step of it, and those that follow.
    const int64_t first = packed ? max(rows.first_from(begin) - 1, int64_t{0}) : batch;
    const int64_t last = packed ? p.rows - 1 : batch;
    for (int64_t row = first; row <= last; ++row) {
      const int64_t row_begin = packed ? rows.boundary(row) : 0;
      const int64_t row_end = packed ? max(row_begin, rows.boundary(row + 1)) : p.seqlen;
      if (row_begin >= end && end < p.seqlen) break;  // what begins at the very end is empty
      const bool begins = row_begin >= begin;
      const int64_t past_state = row_begin + p.width - 1;
      const int64_t from = begins ? row_begin : max(begin, past_state);
      const int64_t to = min(row_end, begins ? max(end, past_state) : end);
      State state{};
      if (begins) {
        state = state_of(row);
        load_history(state);
      } else if (from < to) {
        load_history(from);
      }
      walk(from, to);
      write_state(state, row_begin, row_end);
    }
  }

 private:
  static constexpr int kHistory = kWidth - 1;
  using Channels = Vector<T, kChannels>;

  __device__ int missing_taps() const {
    return kWidth == kMaxConvWidth ? kWidth - static_cast<int>(p.width) : 0;
  }

  template <typename W>
  __device__ void load_weight(const W* from) {
    from += d * p.weight.stride[0];
    if constexpr (kChannels > 1) {
      if (plan.weight_vectors) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) load_floats(from + k * p.weight.stride[1], weight[k]);
        return;
      }
      if (plan.weight_rows) {
        float taps[kChannels * kWidth];
        load_floats(from, taps);
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
#pragma unroll
          for (int i = 0; i < kChannels; ++i) weight[k][i] = taps[i * kWidth + k];
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (k < missing_taps()) continue;
#pragma unroll
      for (int i = 0; i < kChannels; ++i)
        weight[k][i] = to_float(
            from[i * p.weight.stride[0] + (k - missing_taps()) * p.weight.stride[1]]);
    }
  }

  template <typename W>
  __device__ void load_bias(const W* from) {
    from += d * p.bias.stride[0];
    if (plan.bias_vectors) return load_floats(from, bias);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) bias[i] = to_float(from[i * p.bias.stride[0]]);
  }

  // What a sequence has for a state.
  struct State {
    const T* initial;  // null: zeros
    T* final;          // null: not wanted
    int64_t next;      // where a circular one has the next input
  };

  __device__ State state_of(int64_t row) const {
    State state{};
    int64_t slot = row;
    if (p.state_indices.data)
      slot = static_cast<const int32_t*>(p.state_indices.data)[row * p.state_indices.stride[0]];
    if (slot >= p.slots && (p.initial_state.data || p.final_state.data)) {
      report(faults, Fault::causal_conv1d_state_indices);
      slot = -1;
    }
    if (slot >= 0 && p.initial_state.data)
      state.initial = static_cast<const T*>(p.initial_state.data) +
                      slot * p.initial_state.stride[0] + d * p.initial_state.stride[1];
    if (slot >= 0 && p.final_state.data)
      state.final = static_cast<T*>(p.final_state.data) + slot * p.final_state.stride[0] +
                    d * p.final_state.stride[1];
    if (p.cache_seqlens.data) {
      const int32_t seen =
          static_cast<const int32_t*>(p.cache_seqlens.data)[row * p.cache_seqlens.stride[0]];
      if (seen < 0) report(faults, Fault::causal_conv1d_cache_seqlens);
      state.next = max(seen, 0) % p.state_len;
    }
    return state;
  }

  // The inputs before step t, which are of the same sequence.
  __device__ void load_history(int64_t t) {
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
      if (k < missing_taps()) continue;
      set_history(k, load_vector<kChannels>(x + (t - kHistory + k) * p.x.stride[2]));
      if (numbers) history_numbers[k] = numbers[(t - kHistory + k) * p.seq_idx.stride[1]];
    }
  }

  // The inputs before the first step of a sequence.
  __device__ void load_history(const State& state) {
    // The place of the oldest; a tap that is missing may have a negative one.
    int64_t place = p.state_len - kHistory;
    if (p.cache_seqlens.data)
      place = state.next - kHistory + (state.next < p.width - 1 ? p.state_len : 0);
#pragma unroll
    for (int k = 0; k < kHistory; ++k, ++place) {
      Channels entry{};
      if (p.cache_seqlens.data && place == p.state_len) place = 0;
      if (state.initial && k >= missing_taps())
        entry = load_state(state.initial, p.initial_state, place);
      set_history(k, entry);
      history_numbers[k] = -1;
    }
  }

  __device__ Channels load_state(const T* state, const Strided<3>& states, int64_t place) const {
    state += place * states.stride[2];
    if (plan.state_vectors) return load_vector<kChannels>(state);
    Channels entry;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) entry.value[i] = state[i * states.stride[1]];
    return entry;
  }

  __device__ void store_state(T* state, int64_t place, const Channels& entry) const {
    state += place * p.final_state.stride[2];
    if (plan.state_vectors) return store_vector(state, entry);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) state[i * p.final_state.stride[1]] = entry.value[i];
  }

  // The last state_len of (initial, x). Where they share their memory, what is written has been
  // read before.
  __device__ void write_state(const State& state, int64_t row_begin, int64_t row_end) const {
    if (!state.final) return;
    if (p.cache_seqlens.data) return write_circular_state(state, row_begin, row_end);
    constexpr int kBatch = 4;
    for (int64_t place = 0; place < p.state_len; place += kBatch) {
      Channels entry[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        entry[i] = Channels{};
        if (place + i >= p.state_len) continue;
        const int64_t t = row_end - p.state_len + place + i;
        if (t >= row_begin)
          entry[i] = load_vector<kChannels>(x + t * p.x.stride[2]);
        else if (state.initial)
          entry[i] = load_state(state.initial, p.initial_state, t - row_begin + p.state_len);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (place + i < p.state_len) store_state(state.final, place + i, entry[i]);
    }
  }

  __device__ void write_circular_state(const State& state, int64_t row_begin,
                                       int64_t row_end) const {
    const int64_t begin = max(row_begin, row_end - p.state_len);
    int64_t place = (state.next + begin - row_begin) % p.state_len;
    for (int64_t t = begin; t < row_end; ++t) {
      store_state(state.final, place, load_vector<kChannels>(x + t * p.x.stride[2]));
      if (++place == p.state_len) place = 0;
    }
  }

  __device__ void set_history(int k, const Channels& entry) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) history[k][i] = to_float(entry.value[i]);
  }

  __device__ void walk(int64_t begin, int64_t end) {
    if (numbers)
      walk<true>(begin, end);
    else
      walk<false>(begin, end);
  }

  template <bool kNumbered>
  __device__ __forceinline__ void walk(int64_t begin, int64_t end) {
    constexpr int kUnroll = kNumbered ? 2 : kMaxUnroll;
    const T* from = x + begin * p.x.stride[2];
    T* to = out + begin * p.out.stride[2];
    for (int left = static_cast<int>(end - begin); left > 0; left -= kUnroll) {
      Channels inputs[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (i < left) inputs[i] = load_vector<kChannels>(from);
        from += p.x.stride[2];
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (i >= left) return;
        const int32_t number = kNumbered ? numbers[(end - left + i) * p.seq_idx.stride[1]] : 0;
        step<kNumbered>(inputs[i], number, to);
        to += p.out.stride[2];
      }
    }
  }

  template <bool kNumbered>
  __device__ __forceinline__ void step(const Channels& inputs, int32_t number, T* to) {
    Channels result;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const float input = to_float(inputs.value[i]);
      float sum = bias[i];
#pragma unroll
      for (int k = 0; k < kHistory; ++k)
        if (k >= missing_taps() && (!kNumbered || history_numbers[k] == number))
          sum = fmaf(weight[k][i], history[k][i], sum);
      sum = fmaf(weight[kHistory][i], input, sum);
      if (p.activation == Activation::silu) sum = silu(sum);
      if (kNumbered && number < 0) sum = 0.0f;
      result.value[i] = from_float<T>(sum);
#pragma unroll
      for (int k = 0; k + 1 < kHistory; ++k) history[k][i] = history[k + 1][i];
      history[kHistory - 1][i] = input;
    }
    if (kNumbered) {
#pragma unroll
      for (int k = 0; k + 1 < kHistory; ++k) history_numbers[k] = history_numbers[k + 1];
      history_numbers[kHistory - 1] = number;
    }
    store_vector(to, result);
  }

  const CausalConv1dFwdParams& p;
  const CausalConv1dFwdPlan& plan;
  uint32_t* faults;
  int64_t batch, d;
  const T* x;  // of these channels
  T* out;
  const int32_t* numbers = nullptr;  // seq_idx of the row of the batch
  float weight[kWidth][kChannels], bias[kChannels];
  float history[kHistory][kChannels];  // the inputs before the next, oldest first
  int32_t history_numbers[kHistory];
};

}  // namespace ssmcore::cuda
