// The backward of the causal convolution for a few channels, by one thread that walks over the
// steps of a tile. A step's gradient before the activation, g(t), goes to the inputs that the step
// saw: x(t) to x(t - width + 1), whose gradients slide along as a window.
#pragma once

#include "causal_conv1d_bwd_ahead.cuh"
#include "causal_conv1d_bwd_plan.h"
#include "causal_conv1d_bwd_sequence.cuh"
#include "causal_conv1d_sequences.cuh"

namespace ssmcore::cuda {

// `Ahead` holds kAhead steps that are loaded before they are needed. Taps that are missing come
// first, and see nothing.
template <typename T, int kChannels, int kWidth, int kAhead, typename Ahead>
class CausalConv1dWalk {
 public:
  // Channels [d, d + kChannels).
  __device__ __forceinline__ CausalConv1dWalk(const CausalConv1dBwdParams& p,
                                              const CausalConv1dBwdPlan& plan, uint32_t* faults,
                                              int64_t d, Ahead ahead)
      : p(p),
        plan(plan),
        faults(faults),
        d(d),
        ahead(ahead),
        taps(p.fwd, plan.fwd, d, p.fwd.weight_dtype == DType::float32) {}

  // Σ_t g(t) x(t - width + 1 + k) over the steps of all tiles so far, and Σ_t g(t).
  float sums[kWidth + 1][kChannels] = {};

  // The gradients of inputs [begin, end) of a row of the batch, and of the states of the sequences
  // that begin there.
  __device__ __forceinline__ void run(int64_t batch, int64_t begin, int64_t end) {
    const CausalConv1dFwdParams& fwd = p.fwd;
    const PackedRows rows{fwd};
    const bool packed = fwd.cu_seqlens.data;
    // The sequence that `begin` is in, if not the first step of it, and those that follow.
    const int64_t first = packed ? max(rows.first_from(begin) - 1, int64_t{0}) : batch;
    const int64_t last = packed ? fwd.rows - 1 : batch;
    for (int64_t row = first; row <= last; ++row) {
      const int64_t row_begin = packed ? rows.boundary(row) : 0;
      const int64_t row_end = packed ? max(row_begin, rows.boundary(row + 1)) : fwd.seqlen;
      if (row_begin >= end && end < fwd.seqlen) break;  // what begins at the very end is empty
      const bool begins = row_begin >= begin;
      if (!begins && row_end <= begin) continue;
      const CausalConv1dSequence<T> sequence(p, batch, row, row_begin, row_end, faults);
      if (begins) {
        if (fwd.slots > 0) check_state_slot(fwd, row, d / kChannels, fwd.dim / kChannels, faults);
        sequence.put_unseen(d, kChannels);
      }
      load_history(batch, row, max(row_begin, begin), row_begin);
      walk(batch, sequence, begin, end);
    }
  }

 private:
  static constexpr int kHistory = kWidth - 1;
  using Channels = Words<T, kChannels>;

  __device__ __forceinline__ static const T* row_of(const Strided<3>& tensor, int64_t batch,
                                                    int64_t d) {
    return static_cast<const T*>(tensor.data) + batch * tensor.stride[0] + d * tensor.stride[1];
  }
  // 0 where steps have no numbers.
  __device__ __forceinline__ int32_t number(int64_t batch, int64_t t) const {
    const Strided<2>& numbers = p.fwd.seq_idx;
    if (!numbers.data) return 0;
    return static_cast<const int32_t*>(
        numbers.data)[batch * numbers.stride[0] + t * numbers.stride[1]];
  }

  // The inputs before step t of a sequence.
  __device__ void load_history(int64_t batch, int64_t row, int64_t t, int64_t row_begin) {
    const CausalConv1dState<T, kChannels> state(p.fwd, plan.fwd, row, d, faults);
#pragma unroll
    for (int k = 0; k < kHistory; ++k) {
      const int64_t from = t - kHistory + k;
      numbers[k] = p.fwd.seq_idx.data ? -1 : 0;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) inputs[k][c] = gradients[k][c] = 0.0f;
      if (k < taps.missing(p.fwd)) continue;
      if (from >= row_begin)
        to_floats(load_words<kChannels>(row_of(p.fwd.x, batch, d) + from * p.fwd.x.stride[2]),
                  inputs[k]);
      else
        to_floats(state.input(static_cast<int>(row_begin - from)), inputs[k]);
      if (p.fwd.seq_idx.data && from >= row_begin) numbers[k] = number(batch, from);
    }
  }

  // Through what of a sequence lies in steps [begin, end), and as far beyond as these are seen.
  __device__ __forceinline__ void walk(int64_t batch, const CausalConv1dSequence<T>& sequence,
                                       int64_t begin, int64_t end) {
    const int64_t from = max(sequence.begin, begin), inputs_end = min(sequence.end, end);
    const int64_t to = min(sequence.end, end + p.fwd.width - 1);
    // Steps to see, and those of them whose inputs are this tile's. An input leaves the window
    // kHistory steps after its own.
    const int count = static_cast<int>(to - from), own = static_cast<int>(inputs_end - from);
    // The first inputs' gradients are stored as they are.
    const int64_t plain_end = min(inputs_end, sequence.first_kept());
    const int plain = plan.dx_vectors ? static_cast<int>(max(plain_end - from, int64_t{0})) : 0;
    const bool begins = sequence.begin >= begin;
    const int fast_begin = begins && p.fwd.slots > 0 ? min(kHistory, count) : 0;
    int fast_end = fast_begin;
    if (plain > 0 && !p.fwd.seq_idx.data)
      fast_end = max(plain == own ? count : min(count, plain + kHistory), fast_begin);
    // The first step after which an input leaves that is this tile's, or of a state that is.
    const int first = begins ? kHistory - static_cast<int>(p.fwd.width - 1) : kHistory;
    walk_slowly(batch, sequence, from, 0, fast_begin, count, own, first);
    walk_fast(batch, from, fast_begin, fast_end, own, plain);
    walk_slowly(batch, sequence, from, fast_end, max(count, own + kHistory), count, own, first);
  }

  // Steps [begin, end) from `from` on, whose inputs' gradients, where any leave the window, go to
  // dx as they are.
  __device__ __forceinline__ void walk_fast(int64_t batch, int64_t from, int begin, int end,
                                            int own, int plain) {
    const int64_t x_stride = p.fwd.x.stride[2], dout_stride = p.dout.stride[2];
    const T* x = row_of(p.fwd.x, batch, d) + (from + begin) * x_stride;
    const T* dout = row_of(p.dout, batch, d) + (from + begin) * dout_stride;
    T* dx = const_cast<T*>(row_of(p.dx, batch, d)) + (from + begin - kHistory) * p.dx.stride[2];
#pragma unroll
    for (int i = 0; i < kAhead; ++i, x += x_stride, dout += dout_stride) {
      if (begin + i < end) ahead.begin(i, x, dout);
      ahead.commit();
    }
    for (int block = begin; block < end; block += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i, x += x_stride, dout += dout_stride, dx += p.dx.stride[2]) {
        const int step = block + i;
        if (step >= end) break;
        float input[kChannels], g[kChannels], seen[kChannels];
        ahead.wait();
        to_floats(ahead.take(0, i), input);
        to_floats(ahead.take(1, i), g);
        if (step + kAhead < end) ahead.begin(i, x, dout);
        ahead.commit();
        differentiate<false>(input, 0, step < own, g, seen);
        if (step >= kHistory && step - kHistory < plain) store_words(dx, to_words<T>(seen));
      }
    }
  }

  // Steps [begin, end) from `from` on with all that a sequence can bring; those from `count` on are
  // there only for inputs to leave the window.
  __device__ __forceinline__ void walk_slowly(int64_t batch,
                                              const CausalConv1dSequence<T>& sequence, int64_t from,
                                              int begin, int end, int count, int own, int first) {
    const T* x = row_of(p.fwd.x, batch, d) + from * p.fwd.x.stride[2];
    const T* dout = row_of(p.dout, batch, d) + from * p.dout.stride[2];
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
      float input[kChannels] = {}, g[kChannels] = {}, seen[kChannels];
      int32_t step_number = 0;
      if (step < count) {
        to_floats(load_words<kChannels>(x + step * p.fwd.x.stride[2]), input);
        to_floats(load_words<kChannels>(dout + step * p.dout.stride[2]), g);
        step_number = number(batch, from + step);
      }
      differentiate<true>(input, step_number, step < own, g, seen);
      if (step < first || step - kHistory >= own) continue;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sequence.put(from + step - kHistory, d + c, seen[c]);
    }
  }

  // Moves the windows on by a step. g: dout, then of the step before the activation. `seen`: the
  // gradients of the inputs that leave the window.
  template <bool kNumbered>
  __device__ __forceinline__ void differentiate(const float (&input)[kChannels], int32_t own,
                                                bool counts, float (&g)[kChannels],
                                                float (&seen)[kChannels]) {
    const int missing = taps.missing(p.fwd);
    const auto sees = [&](int k) {
      if (k < missing) return false;
      return !kNumbered || (own >= 0 && (k == kHistory || numbers[k] == own));
    };
    if (p.fwd.activation == Activation::silu) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float sum = taps.bias[c];
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          if (sees(k)) sum = fmaf(taps.weight[k][c], k < kHistory ? inputs[k][c] : input[c], sum);
        g[c] *= silu_slope(sum);
      }
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (kNumbered && own < 0) g[c] = 0.0f;
      if (counts) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          if (sees(k)) sums[k][c] = fmaf(g[c], k < kHistory ? inputs[k][c] : input[c], sums[k][c]);
        sums[kWidth][c] += g[c];
      }
      seen[c] = gradients[0][c];
      if (sees(0)) seen[c] = fmaf(taps.weight[0][c], g[c], seen[c]);
#pragma unroll
      for (int k = 0; k + 1 < kHistory; ++k) {
        inputs[k][c] = inputs[k + 1][c];
        gradients[k][c] = gradients[k + 1][c];
        if (sees(k + 1)) gradients[k][c] = fmaf(taps.weight[k + 1][c], g[c], gradients[k][c]);
      }
      inputs[kHistory - 1][c] = input[c];
      gradients[kHistory - 1][c] = taps.weight[kHistory][c] * g[c];
    }
    if (kNumbered) {
#pragma unroll
      for (int k = 0; k + 1 < kHistory; ++k) numbers[k] = numbers[k + 1];
      numbers[kHistory - 1] = own;
    }
  }

  const CausalConv1dBwdParams& p;
  const CausalConv1dBwdPlan& plan;
  uint32_t* faults;
  const int64_t d;
  Ahead ahead;
  const CausalConv1dTaps<T, kChannels, kWidth> taps;
  // The last kHistory inputs, oldest first: values, gradients so far, numbers (seq_idx).
  float inputs[kHistory][kChannels], gradients[kHistory][kChannels];
  int32_t numbers[kHistory];
};

}  // namespace ssmcore::cuda
