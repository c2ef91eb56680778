// The causal convolution of a few channels over a tile of steps, by one thread: a window slides over
// the inputs. Here is also where sequences begin and end, and what they leave as their states.
#pragma once

#include "causal_conv1d_taps.cuh"

namespace ssmcore::cuda {

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

// Taps that are missing come first, and see nothing. kUnroll steps are loaded at once.
template <typename T, int kChannels, int kWidth, int kUnroll>
class CausalConv1dTile {
 public:
  // Channels [d, d + kChannels) of a row of the batch.
  __device__ CausalConv1dTile(const CausalConv1dFwdParams& p, const CausalConv1dFwdPlan& plan,
                              uint32_t* faults, int64_t batch, int64_t d)
      : p(p), plan(plan), faults(faults), batch(batch), d(d), taps(p, plan, d) {
    x = static_cast<const T*>(p.x.data) + batch * p.x.stride[0] + d * p.x.stride[1];
    out = static_cast<T*>(p.out.data) + batch * p.out.stride[0] + d * p.out.stride[1];
    if (p.seq_idx.data)
      numbers = static_cast<const int32_t*>(p.seq_idx.data) + batch * p.seq_idx.stride[0];
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
  using Channels = Words<T, kChannels>;

  // What a sequence has for a state.
  struct State {
    const T* initial;  // null: zeros
    T* final;          // null: not wanted
    int64_t next;      // where a circular one has the next input
  };

  __device__ State state_of(int64_t row) const {
    State state{};
    if (!p.initial_state.data && !p.final_state.data) return state;
    const int64_t slot = slot_of(p, row, faults);
    if (slot >= 0 && p.initial_state.data)
      state.initial = static_cast<const T*>(p.initial_state.data) +
                      slot * p.initial_state.stride[0] + d * p.initial_state.stride[1];
    if (slot >= 0 && p.final_state.data)
      state.final = static_cast<T*>(p.final_state.data) + slot * p.final_state.stride[0] +
                    d * p.final_state.stride[1];
    if (p.cache_seqlens.data) state.next = next_place(p, row, faults);
    return state;
  }

  // The inputs before step t, which are of the same sequence.
  __device__ void load_history(int64_t t) {
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
      if (k < taps.missing(p)) continue;
      to_floats(load_words<kChannels>(x + (t - kHistory + k) * p.x.stride[2]), history[k]);
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
      if (state.initial && k >= taps.missing(p))
        entry = load_state(state.initial, p.initial_state, place);
      to_floats(entry, history[k]);
      history_numbers[k] = -1;
    }
  }

  __device__ Channels load_state(const T* state, const Strided<3>& states, int64_t place) const {
    state += place * states.stride[2];
    if (plan.state_vectors) return load_words<kChannels>(state);
    float values[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) values[i] = to_float(state[i * states.stride[1]]);
    return to_words<T>(values);
  }

  __device__ void store_state(T* state, int64_t place, const Channels& entry) const {
    state += place * p.final_state.stride[2];
    if (plan.state_vectors) return store_words(state, entry);
    float values[kChannels];
    to_floats(entry, values);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) state[i * p.final_state.stride[1]] = from_float<T>(values[i]);
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
          entry[i] = load_words<kChannels>(x + t * p.x.stride[2]);
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
      store_state(state.final, place, load_words<kChannels>(x + t * p.x.stride[2]));
      if (++place == p.state_len) place = 0;
    }
  }

  __device__ __forceinline__ void walk(int64_t begin, int64_t end) {
    const T* from = x + begin * p.x.stride[2];
    T* to = out + begin * p.out.stride[2];
    for (int64_t t = begin; t < end; t += kUnroll) {
      Channels inputs[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i, from += p.x.stride[2])
        if (t + i < end) inputs[i] = load_words<kChannels>(from);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i, to += p.out.stride[2]) {
        if (t + i >= end) return;
        if (numbers)
          step<true>(inputs[i], numbers[(t + i) * p.seq_idx.stride[1]], to);
        else
          step<false>(inputs[i], 0, to);
      }
    }
  }

  template <bool kNumbered>
  __device__ __forceinline__ void step(const Channels& inputs, int32_t number, T* to) {
    float input[kChannels], result[kChannels];
    to_floats(inputs, input);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      float sum = taps.bias[i];
#pragma unroll
      for (int k = 0; k < kHistory; ++k)
        if (k >= taps.missing(p) && (!kNumbered || history_numbers[k] == number))
          sum = fmaf(taps.weight[k][i], history[k][i], sum);
      sum = fmaf(taps.weight[kHistory][i], input[i], sum);
      result[i] = kNumbered && number < 0 ? 0.0f : activate(p, sum);
#pragma unroll
      for (int k = 0; k + 1 < kHistory; ++k) history[k][i] = history[k + 1][i];
      history[kHistory - 1][i] = input[i];
    }
    if (kNumbered) {
#pragma unroll
      for (int k = 0; k + 1 < kHistory; ++k) history_numbers[k] = history_numbers[k + 1];
      history_numbers[kHistory - 1] = number;
    }
    store_words(to, to_words<T>(result));
  }

  const CausalConv1dFwdParams& p;
  const CausalConv1dFwdPlan& plan;
  uint32_t* faults;
  int64_t batch, d;
  const T* x;  // of these channels
  T* out;
  const int32_t* numbers = nullptr;  // seq_idx of the row of the batch
  CausalConv1dTaps<T, kChannels, kWidth> taps;
  float history[kHistory][kChannels];  // the inputs before the next, oldest first
  int32_t history_numbers[kHistory];
};

}  // namespace ssmcore::cuda
