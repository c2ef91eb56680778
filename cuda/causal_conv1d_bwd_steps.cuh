// The backward of the causal convolution for a channel, by a warp whose lanes have neighbouring
// vectors of steps: what a vector needs of its neighbours comes by shuffles. The warp goes
// backwards through a tile, so that the gradients of later steps are there.
#pragma once

#include "causal_conv1d_bwd_ahead.cuh"
#include "causal_conv1d_bwd_plan.h"
#include "causal_conv1d_bwd_sequence.cuh"

namespace ssmcore::cuda {

inline constexpr int kWarp = 32;

// States, where there are any, are of width - 1 inputs: they continue a row before its first step.
// kAhead chunks of a vector a lane are loaded before they are needed.
template <typename T, int kWidth, int kAhead, int kThreads>
class CausalConv1dSteps {
 public:
  static constexpr int kSteps = kVectorSize<T>;
  static constexpr int kHalo = 4;  // inputs before a chunk that are read with it
  using Steps = Words<T, kSteps>;
  using Halo = Words<T, kHalo>;
  using Ahead = SharedAhead<Steps, kAhead, kThreads>;
  // Shared memory of a block.
  struct Memory {
    typename Ahead::Memory ahead;
    Halo before[kAhead][kThreads / kWarp];
  };

  __device__ __forceinline__ CausalConv1dSteps(const CausalConv1dBwdParams& p,
                                               const CausalConv1dBwdPlan& plan, uint32_t* faults,
                                               int d, Memory& memory)
      : p(p),
        plan(plan),
        faults(faults),
        d(d),
        lane(static_cast<int>(threadIdx.x % kWarp)),
        seqlen(static_cast<int>(p.fwd.seqlen)),
        memory(memory),
        ahead{memory.ahead},
        taps(p.fwd, plan.fwd, d, p.fwd.weight_dtype == DType::float32) {}

  // Σ_t g(t) x(t - width + 1 + k) over this lane's steps of all tiles so far, and Σ_t g(t), where
  // g is the gradient before the activation.
  float sums[kWidth + 1] = {};

  // The gradients of a tile of row `batch`, and of its states with the first.
  __device__ __forceinline__ void run(int64_t batch, int64_t tile) {
    const CausalConv1dFwdParams& fwd = p.fwd;
    this->batch = static_cast<int>(batch);
    x = static_cast<const T*>(fwd.x.data) + batch * fwd.x.stride[0] + d * fwd.x.stride[1];
    dout = static_cast<const T*>(p.dout.data) + batch * p.dout.stride[0] + d * p.dout.stride[1];
    dx = static_cast<T*>(p.dx.data) + batch * p.dx.stride[0] + d * p.dx.stride[1];
    const bool has_states = fwd.slots > 0 && state_slot(fwd, batch, faults) >= 0;
    if (tile == 0 && lane == 0 && fwd.slots > 0) check_state_slot(fwd, batch, d, fwd.dim, faults);
    plain_end = !plan.dx_vectors                    ? 0
                : has_states && p.dfinal_state.data ? seqlen - kHistory
                                                    : seqlen;
    // Vector v has the steps from v · kSteps - phase on.
    phase = static_cast<int>(reinterpret_cast<uintptr_t>(x) / sizeof(T) % kSteps);
    const int row_end = (seqlen + phase + kSteps - 1) / kSteps;
    const int length = static_cast<int>(plan.fwd.block_l), first = static_cast<int>(tile) * length;
    const int begin = tile == 0 && has_states && phase < kHistory ? -1 : first;
    const int end = min(first + length, row_end);
    if (begin < end) walk(begin, end, min(end + 1, row_end));
  }

 private:
  static constexpr int kHistory = kWidth - 1;

  // The gradients of vectors [begin, end), of which those up to `seen_end` see inputs.
  __device__ __forceinline__ void walk(int begin, int end, int seen_end) {
    const int chunks = (seen_end - begin + kWarp - 1) / kWarp;
    int v = begin + (chunks - 1) * kWarp + lane;  // of the next chunk to compute
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(i, v - i * kWarp, begin, seen_end);
    float later[kHistory] = {};  // lane 0: g of its first steps in the chunk after this one
    for (int done = 0; done < chunks; done += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i, v -= kWarp) {
        if (done + i >= chunks) break;
        float input[kHistory + kSteps], g[kSteps + kHistory];
        ahead.wait();
        take_inputs(ahead.take(0, i), memory.before[i][threadIdx.x / kWarp], input);
        to_floats(ahead.take(1, i), reinterpret_cast<float (&)[kSteps]>(g));
        load(i, v - kAhead * kWarp, begin, seen_end);
        differentiate(v * kSteps - phase, v < end, input, g, later);
      }
    }
  }

  // Begins to load vector v, of those in [begin, end).
  __device__ __forceinline__ void load(int place, int v, int begin, int end) {
    const int t = v * kSteps - phase;
    if (v < begin || v >= end) {
      ahead.put(0, place, {});
      ahead.put(1, place, {});
    } else if (t >= 0 && t <= seqlen - kSteps) {
      ahead.begin(place, x + t, dout + t);
    } else {
      ahead.put(0, place, load_edge<kSteps>(p, faults, batch, d, t, true));
      ahead.put(1, place, load_edge<kSteps>(p, faults, batch, d, t, false));
    }
    if (lane == 0 && v >= begin) {
      Halo& before = memory.before[place][threadIdx.x / kWarp];
      if (t >= kHalo)
        copy_async<sizeof(Halo)>(&before, x + t - kHalo);
      else
        before = load_edge<kHalo>(p, faults, batch, d, t - kHalo, true);
    }
    ahead.commit();
  }

  // Where some of them are not in the row; those that are nowhere are 0. This and put_edge are
  // rare, and not inlined, since their registers would be missed elsewhere.
  template <int N>
  __device__ __noinline__ static Words<T, N> load_edge(const CausalConv1dBwdParams& p,
                                                       uint32_t* faults, int batch, int d, int t,
                                                       bool is_x) {
    const Strided<3>& tensor = is_x ? p.fwd.x : p.dout;
    const T* row =
        static_cast<const T*>(tensor.data) + batch * tensor.stride[0] + d * tensor.stride[1];
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
      values[i] = t + i >= 0 && t + i < p.fwd.seqlen ? to_float(row[t + i]) : 0.0f;
    const Strided<3>& initial = p.fwd.initial_state;
    const int64_t slot = is_x && t < 0 && initial.data ? state_slot(p.fwd, batch, faults) : -1;
    if (slot >= 0) {
      const T* state =
          static_cast<const T*>(initial.data) + slot * initial.stride[0] + d * initial.stride[1];
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (t + i < 0 && t + i >= -kHistory)
          values[i] = to_float(state[(kHistory + t + i) * initial.stride[2]]);
    }
    return to_words<T>(values);
  }

  __device__ __noinline__ static void put_edge(const CausalConv1dBwdParams& p, uint32_t* faults,
                                               int batch, int d, int t,
                                               Vector<float, kSteps> gradients) {
    const CausalConv1dSequence<T> sequence(p, batch, batch, 0, p.fwd.seqlen, faults);
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (t + i >= -kHistory && t + i < p.fwd.seqlen) sequence.put(t + i, d, gradients.value[i]);
  }

  // A lane's inputs and those before them. `before`: of lane 0.
  __device__ __forceinline__ void take_inputs(const Steps& own, const Halo& before,
                                              float (&input)[kHistory + kSteps]) const {
    Halo halo;
#pragma unroll
    for (int i = 0; i < Halo::kCount; ++i) {
      const uint32_t word = own.words.value[Steps::kCount - Halo::kCount + i];
      const uint32_t left = __shfl_up_sync(0xffffffff, word, 1);
      halo.words.value[i] = lane == 0 ? before.words.value[i] : left;
    }
    float left[kHalo], values[kSteps];
    to_floats(halo, left);
    to_floats(own, values);
#pragma unroll
    for (int i = 0; i < kHistory; ++i) input[i] = left[kHalo - kHistory + i];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) input[kHistory + i] = values[i];
  }

  // g: dout of steps from t on. `counts`: whether they are of the tile, not after it.
  __device__ __forceinline__ void differentiate(int t, bool counts,
                                                const float (&input)[kHistory + kSteps],
                                                float (&g)[kSteps + kHistory],
                                                float (&later)[kHistory]) {
    if (p.fwd.activation == Activation::silu) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        float sum = taps.bias[0];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum = fmaf(taps.weight[k][0], input[i + k], sum);
        g[i] *= silu_slope(sum);
      }
    }
    if (t < 0 || t > seqlen - kSteps) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
        if (t + i < 0 || t + i >= seqlen) g[i] = 0.0f;
    }
    // Of lane + 1: the last lane's is lane 0 of the chunk after this one.
#pragma unroll
    for (int i = 0; i < kHistory; ++i) {
      g[kSteps + i] = __shfl_sync(0xffffffff, lane == 0 ? later[i] : g[i], (lane + 1) % kWarp);
      later[i] = g[i];
    }
    if (!counts) return;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sums[k] = fmaf(g[i], input[i + k], sums[k]);
      sums[kWidth] += g[i];
    }
    Vector<float, kSteps> gradients;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      float gradient = taps.weight[kHistory][0] * g[i];
#pragma unroll
      for (int j = 1; j < kWidth; ++j)
        gradient = fmaf(taps.weight[kHistory - j][0], g[i + j], gradient);
      gradients.value[i] = gradient;
    }
    if (t >= 0 && t <= plain_end - kSteps)
      store_words(dx + t, to_words<T>(gradients.value));
    else
      put_edge(p, faults, batch, d, t, gradients);
  }

  const CausalConv1dBwdParams& p;
  const CausalConv1dBwdPlan& plan;
  uint32_t* faults;
  const int d, lane, seqlen;
  Memory& memory;
  Ahead ahead;
  const CausalConv1dTaps<T, 1, kWidth> taps;
  int batch = 0, phase = 0;
  int plain_end = 0;  // gradients of steps before it go to dx as they are
  const T *x = nullptr, *dout = nullptr;
  T* dx = nullptr;
};

}  // namespace ssmcore::cuda
