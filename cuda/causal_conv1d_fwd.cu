#ifndef CONV_UNROLL
#define CONV_UNROLL 8
#endif
#ifndef CONV_MINB
#define CONV_MINB 4
#endif
#ifndef CONV_BLOCK_L
#define CONV_BLOCK_L 32
#endif
#ifndef CONV_CHUNKS
#define CONV_CHUNKS 2
#endif
#ifndef CONV_THREADS
#define CONV_THREADS 128
#endif
// The causal convolution on the GPU, limited by memory: every input is read once, by vectors along
// whichever of channels and steps is contiguous.
#include "causal_conv1d_fwd_tile.cuh"
#include "causal_conv1d_launch.h"

namespace ssmcore::cuda {
namespace {

constexpr const char* kOp = "causal_conv1d";
constexpr int kThreads = CONV_THREADS;
constexpr int kHalo = 4;            // inputs before a vector of steps that are read with it

// Every entry of cu_seqlens, also those that no tile comes to see.
__device__ void check_cu_seqlens(const CausalConv1dFwdParams& p, uint32_t* faults) {
  if (!p.cu_seqlens.data) return;
  const auto* entries = static_cast<const int32_t*>(p.cu_seqlens.data);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i <= p.rows;
       i += threads) {
    const int64_t entry = entries[i * p.cu_seqlens.stride[0]];
    const int64_t before = i == 0 ? 0 : entries[(i - 1) * p.cu_seqlens.stride[0]];
    if (entry < before || (i == 0 && entry != 0) || (i == p.rows && entry != p.seqlen))
      report(faults, Fault::causal_conv1d_cu_seqlens);
  }
}

// Whether all of steps [t, t + size) see the width - 1 inputs before them, or all that x has, and
// leave no state.
template <int kWidth>
__device__ bool is_plain(const CausalConv1dFwdParams& p, int64_t batch, int64_t t, int64_t size) {
  if (t + size > p.seqlen) return false;
  if (t < kHalo) return t == 0 && !p.cu_seqlens.data && !p.seq_idx.data && !p.initial_state.data && !p.final_state.data;
  if (p.cu_seqlens.data) {
    const PackedRows rows{p};
    const int64_t next = rows.first_from(t + 1);
    return next > 0 && rows.boundary(next - 1) <= t - (kWidth - 1) &&
           rows.boundary(next) >= t + size && t + size < p.seqlen;
  }
  if (p.seq_idx.data) {
    const int32_t* numbers =
        static_cast<const int32_t*>(p.seq_idx.data) + batch * p.seq_idx.stride[0];
    const int32_t number = numbers[t * p.seq_idx.stride[1]];
    bool same = number >= 0;
    for (int64_t i = t - (kWidth - 1); i < t + size; ++i)
      same = same && numbers[i * p.seq_idx.stride[1]] == number;
    return same;
  }
  return true;
}

// --- Channels contiguous ---------------------------------------------------------------------------

constexpr int64_t kMaxBlockL = CONV_BLOCK_L, kMinBlockL = 8;

// Where a thread's tile is.
struct TilePlace {
  int64_t batch, d, begin, end;  // the batch may be beyond the last

  __device__ TilePlace(const CausalConv1dFwdParams& p, const CausalConv1dFwdPlan& plan,
                       int channels) {
    const int64_t lanes = p.dim / channels;
    const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t rest = item % (lanes * plan.tiles);
    batch = item / (lanes * plan.tiles);
    d = (plan.steps_first ? rest / plan.tiles : rest % lanes) * channels;
    begin = (plan.steps_first ? rest % plan.tiles : rest / lanes) * plan.block_l;
    end = min(begin + plan.block_l, p.seqlen);
  }
};

// The same for any layout.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_any_kernel(const __grid_constant__ CausalConv1dFwdParams p,
                             const __grid_constant__ CausalConv1dFwdPlan plan, uint32_t* faults) {
  check_cu_seqlens(p, faults);
  const TilePlace place(p, plan, 1);
  if (place.batch < plan.batch)
    CausalConv1dTile<T, 1, kMaxConvWidth, 8>(p, plan, faults, place.batch, place.d)
        .run(place.begin, place.end);
}

// What is not plain.
template <typename T, int kChannels, int kWidth>
__device__ __noinline__ void run_tile(const CausalConv1dFwdParams& p,
                                      const CausalConv1dFwdPlan& plan, uint32_t* faults,
                                      int64_t batch, int64_t d, int64_t begin, int64_t end) {
  CausalConv1dTile<T, kChannels, kWidth, kChannels == 1 ? 1 : 2>(p, plan, faults, batch, d)
      .run(begin, end);
}

// A thread has a tile of a vector of channels.
template <typename T, int kChannels, int kWidth>
__global__ void __launch_bounds__(kThreads, CONV_MINB)
    causal_conv1d_channels_kernel(const __grid_constant__ CausalConv1dFwdParams p,
                                  const __grid_constant__ CausalConv1dFwdPlan plan,
                                  uint32_t* faults) {
  constexpr int kHistory = kWidth - 1, kUnroll = CONV_UNROLL;
  check_cu_seqlens(p, faults);
  const TilePlace place(p, plan, kChannels);
  if (place.batch >= plan.batch) return;
  if (!is_plain<kWidth>(p, place.batch, place.begin, place.end - place.begin))
    return run_tile<T, kChannels, kWidth>(p, plan, faults, place.batch, place.d, place.begin,
                                          place.end);
  const T* x = static_cast<const T*>(p.x.data) + place.batch * p.x.stride[0] + place.d +
               place.begin * p.x.stride[2];
  T* out = static_cast<T*>(p.out.data) + place.batch * p.out.stride[0] + place.d +
           place.begin * p.out.stride[2];
  const CausalConv1dTaps<T, kChannels, kWidth> taps(p, plan, place.d);
  float window[kWidth][kChannels] = {};
  if (place.begin > 0)
#pragma unroll
    for (int k = 0; k < kHistory; ++k)
      to_floats(load_words<kChannels>(x + (k - kHistory) * p.x.stride[2]), window[k]);

  int steps = static_cast<int>(place.end - place.begin);
  for (; steps > 0; steps -= kUnroll) {
    Words<T, kChannels> inputs[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i, x += p.x.stride[2])
      if (i < steps) inputs[i] = load_words<kChannels>(x);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i, out += p.out.stride[2]) {
      if (i >= steps) return;
      to_floats(inputs[i], window[kHistory]);
      float result[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float sum = taps.bias[c];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum = fmaf(taps.weight[k][c], window[k][c], sum);
        result[c] = activate(p, sum);
#pragma unroll
        for (int k = 0; k < kHistory; ++k) window[k][c] = window[k + 1][c];
      }
      store_words(out, to_words<T>(result));
    }
  }
}

// --- Steps contiguous ------------------------------------------------------------------------------

constexpr int kChunks = CONV_CHUNKS;  // of a thread

// How threads lie on rows of steps.
struct StepsPlan {
  int lanes_log2;     // threads side by side in a row
  int64_t row_blocks; // blocks side by side in a row
};

// A thread has chunks of one channel, each a vector that is aligned in x and out.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_steps_kernel(const __grid_constant__ CausalConv1dFwdParams p,
                               const __grid_constant__ CausalConv1dFwdPlan plan,
                               const __grid_constant__ StepsPlan steps, uint32_t* faults) {
  constexpr int kSteps = kVectorSize<T>;
  check_cu_seqlens(p, faults);
  const int lanes = 1 << steps.lanes_log2;
  const int64_t row = blockIdx.x / steps.row_blocks * (kThreads >> steps.lanes_log2) +
                      (threadIdx.x >> steps.lanes_log2);
  const int64_t batch = row / p.dim, d = row % p.dim;
  if (batch >= plan.batch) return;
  const T* x = static_cast<const T*>(p.x.data) + batch * p.x.stride[0] + d * p.x.stride[1];
  T* out = static_cast<T*>(p.out.data) + batch * p.out.stride[0] + d * p.out.stride[1];
  const int phase = static_cast<int>(reinterpret_cast<uintptr_t>(x) / sizeof(T) % kSteps);
  const int64_t first = (blockIdx.x % steps.row_blocks * kChunks * lanes + threadIdx.x % lanes) *
                            kSteps - phase;

  Words<T, kSteps> inputs[kChunks];
  Words<T, kHalo> halo[kChunks];
  bool plain[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t t = first + c * lanes * kSteps;
    plain[c] = is_plain<kWidth>(p, batch, t, kSteps);
    halo[c] = {};
    if (plain[c]) inputs[c] = load_words<kSteps>(x + t);
    if (plain[c] && t > 0) halo[c] = load_words<kHalo>(x + t - kHalo);
  }
  const CausalConv1dTaps<T, 1, kWidth> taps(p, plan, d);

#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t t = first + c * lanes * kSteps;
    if (!plain[c]) {
      if (t < p.seqlen && t + kSteps > 0)
        run_tile<T, 1, kWidth>(p, plan, faults, batch, d, max(t, int64_t{0}),
                             min(t + kSteps, p.seqlen));
      continue;
    }
    float before[kHalo], input[kSteps], result[kSteps];
    to_floats(halo[c], before);
    to_floats(inputs[c], input);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      float sum = taps.bias[0];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const int from = i + k - (kWidth - 1);
        sum = fmaf(taps.weight[k][0], from < 0 ? before[kHalo + from] : input[from], sum);
      }
      result[i] = activate(p, sum);
    }
    store_words(out + t, to_words<T>(result));
  }
}

// --- Launch ----------------------------------------------------------------------------------------

template <typename T>
void launch_any(const CausalConv1dFwdParams& p, const Exec& exec) {
  CausalConv1dFwdPlan plan = plan_for(p, 1);
  plan.steps_first = p.x.stride[2] < p.x.stride[1];
  plan.block_l = kMinBlockL;
  plan.tiles = ceil_div(p.seqlen, plan.block_l);
  launch_kernel(kOp, causal_conv1d_any_kernel<T>,
                {blocks_for(plan.batch * p.dim * plan.tiles, kThreads), kThreads}, exec, p, plan,
                exec.context.cuda().faults());
}

template <typename T, int kChannels, int kWidth>
void launch_channels(const CausalConv1dFwdParams& p, const Exec& exec) {
  CausalConv1dFwdPlan plan = plan_for(p, kChannels);
  // Shorter tiles where the GPU would have too little to do.
  const int64_t lanes = plan.batch * (p.dim / kChannels);
  plan.block_l = kMaxBlockL;
  while (plan.block_l > kMinBlockL &&
         lanes * ceil_div(p.seqlen, plan.block_l) < exec.context.cuda().num_sms() * 512)
    plan.block_l /= 2;
  plan.tiles = ceil_div(p.seqlen, plan.block_l);
  launch_kernel(kOp, causal_conv1d_channels_kernel<T, kChannels, kWidth>,
                {blocks_for(lanes * plan.tiles, kThreads), kThreads}, exec, p, plan,
                exec.context.cuda().faults());
}

// Whether rows of x and out can be read by vectors of steps, from the same step on.
bool takes_step_vectors(const CausalConv1dFwdParams& p, int64_t size) {
  const auto distance =
      reinterpret_cast<uintptr_t>(p.x.data) - reinterpret_cast<uintptr_t>(p.out.data);
  return p.width <= kMaxVectorWidth && p.x.stride[2] == 1 && p.out.stride[2] == 1 &&
         p.seqlen >= size && distance % 16 == 0 &&
         (p.x.stride[0] - p.out.stride[0]) % size == 0 &&
         (p.x.stride[1] - p.out.stride[1]) % size == 0;
}

template <typename T, int kWidth>
void launch_steps(const CausalConv1dFwdParams& p, const Exec& exec) {
  constexpr int64_t kSteps = kVectorSize<T>;
  const CausalConv1dFwdPlan plan = plan_for(p, 1);
  const bool rows_aligned =
      has_vectors(p.x.data, p.dtype, kSteps, p.x.stride[0], p.x.stride[1]);
  const int64_t chunks = ceil_div(p.seqlen + (rows_aligned ? 0 : kSteps - 1), kSteps);
  StepsPlan steps{};
  while ((1 << steps.lanes_log2) < kThreads && (kChunks << steps.lanes_log2) < chunks)
    ++steps.lanes_log2;
  steps.row_blocks = ceil_div(chunks, kChunks << steps.lanes_log2);
  const int64_t blocks_down = ceil_div(plan.batch * p.dim, kThreads >> steps.lanes_log2);
  launch_kernel(kOp, causal_conv1d_steps_kernel<T, kWidth>,
                {blocks_for(blocks_down * steps.row_blocks, 1), kThreads}, exec, p, plan, steps,
                exec.context.cuda().faults());
}

}  // namespace

size_t causal_conv1d_fwd_workspace_size(const CausalConv1dFwdParams&, const Context&) {
  return 0;
}

void causal_conv1d_fwd(const CausalConv1dFwdParams& p, const Exec& exec) {
  if (is_causal_conv1d_update(p)) return launch_causal_conv1d_update(p, exec);
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kSize = kVectorSize<T>;
    if (takes_channel_vectors(p, kSize))
      with_vector_width(p.width, [&](auto width) { launch_channels<T, kSize, width>(p, exec); });
    else if (takes_step_vectors(p, kSize))
      with_vector_width(p.width, [&](auto width) { launch_steps<T, width>(p, exec); });
    else
      launch_any<T>(p, exec);
  });
}

}  // namespace ssmcore::cuda
