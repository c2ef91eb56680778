// The causal convolution on the GPU, limited by memory: every input is read once, by vectors along
// whichever of channels and steps is contiguous.
#include "causal_conv1d_fwd_tile.cuh"
#include "causal_conv1d_launch.h"

namespace ssmcore::cuda {
namespace {

constexpr const char* kOp = "causal_conv1d";
constexpr int kThreads = 128;
constexpr int kHalo = 4;  // inputs before a vector of steps that are read with it

// Every entry of cu_seqlens, also those that no tile comes to see.
__device__ void check_cu_seqlens(const CausalConv1dFwdParams& p, uint32_t* faults) {
  if (!p.cu_seqlens.data) return;
  const auto* entries = static_cast<const int32_t*>(p.cu_seqlens.data);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i <= p.rows;
       i += threads) {
    const int64_t entry = entries[i * p.cu_seqlens.stride[0]];
    const int64_t before = i == 0 ? 0 : entries[(i - 1) * p.cu_seqlens.stride[0]];
    if (entry < before || (i == 0 && entry != 0) || (i == p.rows && entry != p.seqlen))
      report(faults, Fault::causal_conv1d_cu_seqlens);
  }
}

// --- Channels contiguous -------------------------------------------------------------------------

// Steps of a tile of vectors, and of one of single channels, whose overhead weighs more.
constexpr int64_t kBlockL = 8, kSingleBlockL = 32;

// Where a thread's tile is, in integers that are large enough.
template <typename Index>
struct TilePlace {
  int64_t batch, d, begin, end;  // the batch may be beyond the last

  __device__ TilePlace(const CausalConv1dFwdParams& p, const CausalConv1dFwdPlan& plan,
                       int channels) {
    const Index lanes = p.dim / channels, tiles = plan.tiles;
    const Index item = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
    const Index all = item / (plan.steps_first ? tiles : lanes);
    const Index inner = item - all * (plan.steps_first ? tiles : lanes);
    batch = all / (plan.steps_first ? lanes : tiles);
    const Index outer = all - static_cast<Index>(batch) * (plan.steps_first ? lanes : tiles);
    d = static_cast<int64_t>(plan.steps_first ? outer : inner) * channels;
    begin = (plan.steps_first ? inner : outer) * plan.block_l;
    end = min(begin + plan.block_l, p.seqlen);
  }
};

// A thread has a tile of some channels, with all that sequences can bring: of any layout and width
// if it is one channel.
template <typename T, int kChannels, int kWidth>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_tiles_kernel(const __grid_constant__ CausalConv1dFwdParams p,
                               const __grid_constant__ CausalConv1dFwdPlan plan, uint32_t* faults) {
  check_cu_seqlens(p, faults);
  const TilePlace<int64_t> place(p, plan, kChannels);
  if (place.batch < plan.batch)
    CausalConv1dTile<T, kChannels, kWidth, kChannels == 1 ? 8 : 4>(p, plan, faults, place.batch,
                                                                   place.d)
        .run(place.begin, place.end);
}

// The next kUnroll of `steps` steps of some channels.
template <int kUnroll, typename T, int kChannels>
__device__ __forceinline__ void load_steps(Words<T, kChannels> (&to)[kUnroll], const T* from,
                                           int64_t stride, int steps) {
#pragma unroll
  for (int i = 0; i < kUnroll; ++i)
    if (i < steps) to[i] = load_words<kChannels>(from + i * stride);
}

// The inputs before the first step of a row.
template <typename T, int kChannels, int kHistory>
__device__ __forceinline__ void load_initial(const CausalConv1dFwdParams& p,
                                             const CausalConv1dFwdPlan& plan, int64_t row,
                                             int64_t d, uint32_t* faults,
                                             Words<T, kChannels> (&to)[kHistory]) {
  const CausalConv1dState<T, kChannels> state(p, plan, row, d, faults);
#pragma unroll
  for (int k = 0; k < kHistory; ++k) to[k] = state.input(kHistory - k);
}

// Tiles of vectors where every row is one sequence: a thread computes on some steps while it loads
// the next.
template <typename T, int kChannels, int kWidth>
__global__ void __launch_bounds__(kThreads, 4)
    causal_conv1d_channels_kernel(const __grid_constant__ CausalConv1dFwdParams p,
                                  const __grid_constant__ CausalConv1dFwdPlan plan,
                                  uint32_t* faults) {
  constexpr int kHistory = kWidth - 1, kUnroll = 4;
  const TilePlace<uint32_t> place(p, plan, kChannels);
  if (place.batch >= plan.batch) return;
  const T* x = static_cast<const T*>(p.x.data) + place.batch * p.x.stride[0] + place.d +
               place.begin * p.x.stride[2];
  T* out = static_cast<T*>(p.out.data) + place.batch * p.out.stride[0] + place.d +
           place.begin * p.out.stride[2];
  int steps = static_cast<int>(place.end - place.begin);
  Words<T, kChannels> before[kHistory], next[kUnroll];
  if (place.begin > 0)
    load_steps(before, x - kHistory * p.x.stride[2], p.x.stride[2], kHistory);
  else
    load_initial(p, plan, place.batch, place.d, faults, before);
  load_steps(next, x, p.x.stride[2], steps);
  const CausalConv1dTaps<T, kChannels, kWidth> taps(p, plan, place.d);
  float window[kWidth][kChannels];
#pragma unroll
  for (int k = 0; k < kHistory; ++k) to_floats(before[k], window[k]);

  for (; steps > 0; steps -= kUnroll) {
    Words<T, kChannels> now[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) now[i] = next[i];
    x += kUnroll * p.x.stride[2];
    load_steps(next, x, p.x.stride[2], steps - kUnroll);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i, out += p.out.stride[2]) {
      if (i >= steps) break;
      to_floats(now[i], window[kHistory]);
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
  if (place.begin == 0)
    CausalConv1dState<T, kChannels>(p, plan, place.batch, place.d, faults)
        .update(static_cast<const T*>(p.x.data) + place.batch * p.x.stride[0] + place.d, 0,
                p.seqlen);
}

// --- Steps contiguous ----------------------------------------------------------------------------

constexpr int kStepsThreads = 256;
constexpr int kMaxRowsPerThread = 4;

// How the threads of a block lie on rows of steps, and blocks on the rows of a batch.
struct StepsPlan {
  int lanes_log2;         // threads side by side in a row
  int rows_per_thread;    // one after the other
  uint32_t row_blocks;    // blocks side by side in a row
  uint32_t batch_blocks;  // blocks of a batch
};

// N steps of a row from step t on, of which those outside [0, seqlen) are 0.
template <int N, typename T>
__device__ __forceinline__ Words<T, N> load_part(const T* row, int64_t t, int64_t seqlen) {
  if (t >= 0 && t + N <= seqlen) return load_words<N>(row + t);
  float values[N];
#pragma unroll
  for (int i = 0; i < N; ++i)
    values[i] = t + i >= 0 && t + i < seqlen ? to_float(row[t + i]) : 0.0f;
  return to_words<T>(values);
}

template <int N, typename T>
__device__ __forceinline__ void store_part(T* row, int64_t t, int64_t seqlen,
                                           const Words<T, N>& from) {
  if (t >= 0 && t + N <= seqlen) return store_words(row + t, from);
  float values[N];
  to_floats(from, values);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (t + i >= 0 && t + i < seqlen) row[t + i] = from_float<T>(values[i]);
}

// A vector of a channel's steps, from t on, and what its outputs need; as loaded.
template <typename T, int kWidth>
struct StepsPiece {
  static constexpr int kSteps = kVectorSize<T>;
  int64_t t;
  Words<T, kSteps> inputs;
  Words<T, kHalo> halo;
  uint32_t weight[kWidth], bias;  // float32, or T in the lower half

  __device__ __forceinline__ void load(const CausalConv1dFwdParams& p,
                                       const CausalConv1dFwdPlan& plan, int64_t batch, int64_t d,
                                       int64_t vector, uint32_t* faults) {
    const T* x = static_cast<const T*>(p.x.data) + batch * p.x.stride[0] + d * p.x.stride[1];
    t = vector * kSteps - static_cast<int>(reinterpret_cast<uintptr_t>(x) / sizeof(T) % kSteps);
    inputs = load_part<kSteps>(x, t, p.seqlen);
    halo = load_part<kHalo>(x, t - kHalo, p.seqlen);
    if (t == 0 && p.initial_state.data) {
      const CausalConv1dState<T, 1> state(p, plan, batch, d, faults);
      float before[kHalo];
#pragma unroll
      for (int i = 0; i < kHalo; ++i) {
        float value[1] = {};
        if (i > kHalo - kWidth) to_floats(state.input(kHalo - i), value);
        before[i] = value[0];
      }
      halo = to_words<T>(before);
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      weight[k] = load_parameter(p.weight.data, p.weight_dtype,
                                 d * p.weight.stride[0] + k * p.weight.stride[1]);
    bias = p.bias.data ? load_parameter(p.bias.data, p.bias_dtype, d * p.bias.stride[0]) : 0;
  }

  // After all else that reads the states.
  __device__ __forceinline__ void update_state(const CausalConv1dFwdParams& p,
                                               const CausalConv1dFwdPlan& plan, int64_t batch,
                                               int64_t d, uint32_t* faults) const {
    if (t != 0 || !p.final_state.data) return;
    const T* x = static_cast<const T*>(p.x.data) + batch * p.x.stride[0] + d * p.x.stride[1];
    CausalConv1dState<T, 1>(p, plan, batch, d, faults).update(x, 0, p.seqlen);
  }

  __device__ __forceinline__ Words<T, kSteps> convolve(const CausalConv1dFwdParams& p) const {
    float before[kHalo], input[kSteps], result[kSteps], w[kWidth];
    to_floats(halo, before);
    to_floats(inputs, input);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) w[k] = parameter(weight[k], p.weight_dtype);
    const float b = parameter(bias, p.bias_dtype);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      float sum = b;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const int from = i + k - (kWidth - 1);
        sum = fmaf(w[k], from < 0 ? before[kHalo + from] : input[from], sum);
      }
      result[i] = activate(p, sum);
    }
    return to_words<T>(result);
  }

 private:
  static __device__ uint32_t load_parameter(const void* data, DType dtype, int64_t at) {
    return dtype == DType::float32 ? static_cast<const uint32_t*>(data)[at]
                                   : static_cast<const uint16_t*>(data)[at];
  }
  static __device__ float parameter(uint32_t word, DType dtype) {
    if (sizeof(T) == 4 || dtype == DType::float32) return __uint_as_float(word);
    const uint16_t half = static_cast<uint16_t>(word);
    return to_float(reinterpret_cast<const T&>(half));
  }
};

// A thread has the same steps of some channels, a vector of each that is aligned in x and out. It
// computes on one while it loads the next.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kStepsThreads, 5)
    causal_conv1d_steps_kernel(const __grid_constant__ CausalConv1dFwdParams p,
                               const __grid_constant__ CausalConv1dFwdPlan plan,
                               const __grid_constant__ StepsPlan steps, uint32_t* faults) {
  using Piece = StepsPiece<T, kWidth>;
  const int rows = kStepsThreads >> steps.lanes_log2;  // side by side
  const uint32_t batch = blockIdx.x / steps.batch_blocks, block = blockIdx.x % steps.batch_blocks;
  const uint32_t vector = (block % steps.row_blocks << steps.lanes_log2) +
                          (threadIdx.x & ((1 << steps.lanes_log2) - 1));
  int64_t d = static_cast<int64_t>(block / steps.row_blocks) * rows * steps.rows_per_thread +
              (threadIdx.x >> steps.lanes_log2);
  const int64_t end = min(d + rows * steps.rows_per_thread, p.dim);
  if (d >= end) return;
  Piece next;
  next.load(p, plan, batch, d, vector, faults);
  for (; d < end; d += rows) {
    const Piece now = next;
    if (d + rows < end) next.load(p, plan, batch, d + rows, vector, faults);
    T* out = static_cast<T*>(p.out.data) + batch * p.out.stride[0] + d * p.out.stride[1];
    store_part(out, now.t, p.seqlen, now.convolve(p));
    now.update_state(p, plan, batch, d, faults);
  }
}

// --- Launch --------------------------------------------------------------------------------------

template <typename T, int kChannels, int kWidth>
void launch_tiles(const CausalConv1dFwdParams& p, const Exec& exec) {
  CausalConv1dFwdPlan plan = plan_for(p, kChannels);
  plan.steps_first = kChannels == 1 && p.x.stride[2] < p.x.stride[1];
  plan.block_l = kChannels > 1 || plan.steps_first ? kBlockL : kSingleBlockL;
  plan.tiles = ceil_div(p.seqlen, plan.block_l);
  const int64_t threads = plan.batch * (p.dim / kChannels) * plan.tiles;
  const bool plain = !p.cu_seqlens && !p.seq_idx && threads <= INT32_MAX;
  void (*kernel)(CausalConv1dFwdParams, CausalConv1dFwdPlan, uint32_t*) =
      causal_conv1d_tiles_kernel<T, kChannels, kWidth>;
  if constexpr (kChannels > 1)
    if (plain) kernel = causal_conv1d_channels_kernel<T, kChannels, kWidth>;
  launch_kernel(kOp, kernel, {blocks_for(threads, kThreads), kThreads}, exec, p, plan,
                exec.context.cuda().faults());
}

bool rows_aligned(const CausalConv1dFwdParams& p, int64_t size) {
  return has_vectors(p.x.data, p.dtype, size, p.x.stride[0], p.x.stride[1]);
}

// Whether rows of x and out can be read by vectors of steps, from the same step on, and nobody but
// the thread that has the first vector needs a state.
bool takes_step_vectors(const CausalConv1dFwdParams& p, int64_t size) {
  const auto distance =
      reinterpret_cast<uintptr_t>(p.x.data) - reinterpret_cast<uintptr_t>(p.out.data);
  return p.width <= kMaxVectorWidth && !p.cu_seqlens && !p.seq_idx &&
         (rows_aligned(p, size) || !(p.initial_state || p.final_state)) && p.x.stride[2] == 1 &&
         p.out.stride[2] == 1 && p.seqlen >= size && distance % 16 == 0 &&
         (p.x.stride[0] - p.out.stride[0]) % size == 0 &&
         (p.x.stride[1] - p.out.stride[1]) % size == 0;
}

template <typename T, int kWidth>
void launch_steps(const CausalConv1dFwdParams& p, const Exec& exec) {
  constexpr int64_t kSteps = kVectorSize<T>;
  const CausalConv1dFwdPlan plan = plan_for(p, 1);
  const int64_t vectors = ceil_div(p.seqlen + (rows_aligned(p, kSteps) ? 0 : kSteps - 1), kSteps);
  StepsPlan steps{};
  while ((1 << steps.lanes_log2) < std::min<int64_t>(vectors, kStepsThreads)) ++steps.lanes_log2;
  const int64_t row_blocks = ceil_div(vectors, 1 << steps.lanes_log2);
  // Fewer rows where the GPU would have too little to do.
  const int64_t rows = kStepsThreads >> steps.lanes_log2;
  const auto blocks = [&] {
    return plan.batch * row_blocks * ceil_div(p.dim, rows * steps.rows_per_thread);
  };
  constexpr int64_t kBlocksPerSm = 16;
  steps.rows_per_thread = kMaxRowsPerThread;
  while (steps.rows_per_thread > 1 && blocks() < kBlocksPerSm * exec.context.cuda().num_sms())
    steps.rows_per_thread /= 2;
  if (blocks() > INT32_MAX) return launch_tiles<T, 1, kMaxConvWidth>(p, exec);
  steps.row_blocks = static_cast<uint32_t>(row_blocks);
  steps.batch_blocks = static_cast<uint32_t>(blocks() / plan.batch);
  launch_kernel(kOp, causal_conv1d_steps_kernel<T, kWidth>,
                {blocks_for(blocks(), 1), kStepsThreads}, exec, p, plan, steps,
                exec.context.cuda().faults());
}

}  // namespace

size_t causal_conv1d_fwd_workspace_size(const CausalConv1dFwdParams&, const Context&) {
  return 0;
}

void causal_conv1d_fwd(const CausalConv1dFwdParams& params, const Exec& exec) {
  CausalConv1dFwdParams p = params;
  for (Strided<3>* tensor : {&p.x, &p.out}) {
    // A stride over one element keeps nothing from being aligned.
    if (p.cu_seqlens || p.rows == 1) tensor->stride[0] = 0;
    if (p.seqlen == 1) tensor->stride[2] = 0;
  }
  if (is_causal_conv1d_update(p)) return launch_causal_conv1d_update(p, exec);
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kSize = kVectorSize<T>;
    if (takes_channel_vectors(p, kSize))
      with_vector_width(p.width, [&](auto width) { launch_tiles<T, kSize, width>(p, exec); });
    else if (takes_step_vectors(p, kSize))
      with_vector_width(p.width, [&](auto width) { launch_steps<T, width>(p, exec); });
    else
      launch_tiles<T, 1, kMaxConvWidth>(p, exec);
  });
}

}  // namespace ssmcore::cuda
