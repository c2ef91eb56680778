// The causal convolution of a few channels over a tile of steps, by one thread: a window slides
// over the inputs. Here is also where sequences begin and end, and what they leave as their states.
#pragma once

#include "causal_conv1d_sequences.cuh"
#include "causal_conv1d_state.cuh"

namespace ssmcore::cuda {

// Taps that are missing come first, and see nothing. kUnroll steps are loaded at once.
template <typename T, int kChannels, int kWidth, int kUnroll>
class CausalConv1dTile {
 public:
  // Channels [d, d + kChannels) of a row of the batch.
  __device__ CausalConv1dTile(const CausalConv1dFwdParams& p, const CausalConv1dFwdPlan& plan,
                              uint32_t* faults, int64_t batch, int64_t d)
      : p(p),
        plan(plan),
        faults(faults),
        batch(batch),
        d(d),
        taps(p, plan, d, p.weight_dtype == DType::float32) {
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
      if (begins) {
        const CausalConv1dState<T, kChannels> state(p, plan, row, d, faults);
        state.check_slot();
        load_history(state);
        walk(from, to);
        state.update(x, row_begin, row_end);
      } else if (from < to) {
        load_history(from);
        walk(from, to);
      }
    }
  }

 private:
  static constexpr int kHistory = kWidth - 1;
  using Channels = Words<T, kChannels>;

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
  __device__ void load_history(const CausalConv1dState<T, kChannels>& state) {
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
      if (k >= taps.missing(p)) to_floats(state.input(kHistory - k), history[k]);
      history_numbers[k] = -1;
    }
  }

  __device__ void walk(int64_t begin, int64_t end) {
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
