// The causal convolution on the GPU, limited by memory: every input is read once, by vectors along
// whichever of channels and steps is contiguous.
#include "causal_conv1d_fwd_tile.cuh"
#include "causal_conv1d_launch.h"
#include "device/divisor.cuh"

namespace ssmcore::cuda {
namespace {

constexpr const char* kOp = "causal_conv1d";
constexpr int kThreads = 128;
constexpr int kHalo = 4;  // inputs before a vector of steps that are read with it

// --- Any layout ----------------------------------------------------------------------------------

// A thread has a tile of some channels, with all that sequences can bring: of any layout and width
// if it is one channel.
template <typename T, int kChannels, int kWidth>
__global__ void __launch_bounds__(kThreads)
    causal_conv1d_tiles_kernel(const __grid_constant__ CausalConv1dFwdParams p,
                               const __grid_constant__ CausalConv1dFwdPlan plan, uint32_t* faults) {
  check_cu_seqlens(p, faults);
  const int64_t lanes = p.dim / kChannels;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t all = item / (plan.steps_first ? plan.tiles : lanes);
  const int64_t inner = item - all * (plan.steps_first ? plan.tiles : lanes);
  const int64_t batch = all / (plan.steps_first ? lanes : plan.tiles);
  const int64_t outer = all - batch * (plan.steps_first ? lanes : plan.tiles);
  if (batch >= plan.batch) return;
  const int64_t begin = (plan.steps_first ? inner : outer) * plan.block_l;
  CausalConv1dTile<T, kChannels, kWidth, kChannels == 1 ? 8 : 4>(
      p, plan, faults, batch, (plan.steps_first ? outer : inner) * kChannels)
      .run(begin, min(begin + plan.block_l, p.seqlen));
}

// --- Channels contiguous, every row one sequence -------------------------------------------------

constexpr int kBlockL = 8;

// A thread has a tile of a vector of channels, all of which it loads before it computes.
template <typename T, typename Weight, int kWidth>
__global__ void __launch_bounds__(kThreads, 4)
    causal_conv1d_channels_kernel(const __grid_constant__ CausalConv1dFwdParams p,
                                  const __grid_constant__ CausalConv1dFwdPlan plan,
                                  const Divisor lanes, const Divisor tiles, uint32_t* faults) {
  constexpr int kChannels = kVectorSize<T>, kHistory = kWidth - 1;
  uint32_t lane = blockIdx.x * kThreads + threadIdx.x;
  uint32_t tile = lanes.divide(lane);
  const int64_t batch = tiles.divide(tile), d = static_cast<int64_t>(lane) * kChannels;
  if (batch >= plan.batch) return;
  const int64_t begin = static_cast<int64_t>(tile) * kBlockL;
  const int steps = static_cast<int>(min(p.seqlen - begin, static_cast<int64_t>(kBlockL)));
  const T* row = static_cast<const T*>(p.x.data) + batch * p.x.stride[0] + d;
  Words<T, kChannels> inputs[kHistory + kBlockL];
  if (begin == 0) {
    const CausalConv1dState<T, kChannels> state(p, plan, batch, d, faults);
    state.check_slot();
#pragma unroll
    for (int k = 0; k < kHistory; ++k) inputs[k] = state.input(kHistory - k);
  }
#pragma unroll
  for (int i = 0; i < kHistory + kBlockL; ++i)
    if (i < kHistory ? begin > 0 : i - kHistory < steps)
      inputs[i] = load_words<kChannels>(row + (begin - kHistory + i) * p.x.stride[2]);
  const CausalConv1dTaps<T, kChannels, kWidth> taps(p, plan, d, std::is_same_v<Weight, float>);

  float window[kWidth][kChannels];
#pragma unroll
  for (int k = 0; k < kHistory; ++k) to_floats(inputs[k], window[k]);
  T* out = static_cast<T*>(p.out.data) + batch * p.out.stride[0] + d + begin * p.out.stride[2];
#pragma unroll
  for (int i = 0; i < kBlockL; ++i, out += p.out.stride[2]) {
    if (i >= steps) break;
    to_floats(inputs[kHistory + i], window[kHistory]);
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
  if (begin == 0)
    CausalConv1dState<T, kChannels>(p, plan, batch, d, faults).update(row, 0, p.seqlen);
}

// --- Steps contiguous, every row one sequence ----------------------------------------------------

constexpr int kStepsThreads = 256;

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

// Those outside [begin, seqlen) are left.
template <int N, typename T>
__device__ __forceinline__ void store_part(T* row, int64_t t, int64_t begin, int64_t seqlen,
                                           const Words<T, N>& from) {
  if (t >= begin && t + N <= seqlen) return store_words(row + t, from);
  float values[N];
  to_floats(from, values);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (t + i >= begin && t + i < seqlen) row[t + i] = from_float<T>(values[i]);
}

// A thread has a vector of a channel's steps, aligned in x and out: nothing but many short threads
// keeps the memory as busy. Outputs before `begin`, where states matter, are others' to write.
template <typename T, typename Weight, int kWidth>
__global__ void __launch_bounds__(kStepsThreads, 8)
    causal_conv1d_steps_kernel(const __grid_constant__ CausalConv1dFwdParams p,
                               const __grid_constant__ CausalConv1dFwdPlan plan,
                               const Divisor vectors, const Divisor rows, int64_t begin) {
  constexpr int kSteps = kVectorSize<T>;
  uint32_t vector = blockIdx.x * kStepsThreads + threadIdx.x;
  uint32_t row = vectors.divide(vector);
  const int64_t batch = rows.divide(row), d = row;
  if (batch >= plan.batch) return;
  const T* x = static_cast<const T*>(p.x.data) + batch * p.x.stride[0] + d * p.x.stride[1];
  T* out = static_cast<T*>(p.out.data) + batch * p.out.stride[0] + d * p.out.stride[1];
  const int64_t t = static_cast<int64_t>(vector) * kSteps -
                    static_cast<int>(reinterpret_cast<uintptr_t>(x) / sizeof(T) % kSteps);
  const auto inputs = load_part<kSteps>(x, t, p.seqlen);
  const auto halo = load_part<kHalo>(x, t - kHalo, p.seqlen);
  const Weight* taps = static_cast<const Weight*>(p.weight.data) + d * p.weight.stride[0];
  Weight weight[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) weight[k] = taps[k * p.weight.stride[1]];
  CausalConv1dWeights<T, 1> bias{};
  const bool is_float32 = p.bias_dtype == DType::float32;
  if (p.bias.data) bias.load(p.bias.data, is_float32, d * p.bias.stride[0]);

  float input[kSteps], before[kHalo], result[kSteps];
  to_floats(inputs, input);
  to_floats(halo, before);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    float sum = bias.value(is_float32, 0);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const int from = i + k - (kWidth - 1);
      sum = fmaf(to_float(weight[k]), from < 0 ? before[kHalo + from] : input[from], sum);
    }
    result[i] = activate(p, sum);
  }
  store_part(out, t, begin, p.seqlen, to_words<T>(result));
}

// --- Launch --------------------------------------------------------------------------------------

// Steps of a tile of single channels where neighbouring threads have neighbouring channels: what a
// tile costs besides weighs more.
constexpr int64_t kSingleBlockL = 32;

// Tiles of all steps, or of the first `first_steps` alone.
template <typename T, int kChannels, int kWidth>
void launch_tiles(const CausalConv1dFwdParams& p, const Exec& exec, int64_t first_steps = 0) {
  CausalConv1dFwdPlan plan = plan_for(p, kChannels);
  plan.steps_first = kChannels == 1 && p.x.stride[2] < p.x.stride[1];
  plan.block_l = first_steps > 0                     ? first_steps
                 : kChannels > 1 || plan.steps_first ? kBlockL
                                                     : kSingleBlockL;
  plan.tiles = first_steps > 0 ? 1 : ceil_div(p.seqlen, plan.block_l);
  launch_kernel(kOp, causal_conv1d_tiles_kernel<T, kChannels, kWidth>,
                {blocks_for(plan.batch * (p.dim / kChannels) * plan.tiles, kThreads), kThreads},
                exec, p, plan, exec.context.cuda().faults());
}

// Whether what is for one sequence a row, in 32-bit integers, will do.
bool is_plain(const CausalConv1dFwdParams& p, int64_t items) {
  return !p.cu_seqlens && !p.seq_idx && items <= INT32_MAX;
}

template <typename T, typename Weight, int kWidth>
void launch_channels(const CausalConv1dFwdParams& p, const Exec& exec) {
  constexpr int64_t kChannels = kVectorSize<T>;
  const int64_t lanes = p.dim / kChannels, tiles = ceil_div(p.seqlen, kBlockL);
  const int64_t items = p.rows * lanes * tiles;
  if (!is_plain(p, items)) return launch_tiles<T, kChannels, kWidth>(p, exec);
  launch_kernel(kOp, causal_conv1d_channels_kernel<T, Weight, kWidth>,
                {blocks_for(items, kThreads), kThreads}, exec, p, plan_for(p, kChannels),
                Divisor(lanes), Divisor(tiles), exec.context.cuda().faults());
}

// Whether rows of x and out can be read by vectors of steps, from the same step on.
bool takes_step_vectors(const CausalConv1dFwdParams& p, int64_t size) {
  const auto distance =
      reinterpret_cast<uintptr_t>(p.x.data) - reinterpret_cast<uintptr_t>(p.out.data);
  return p.width <= kMaxVectorWidth && p.x.stride[2] == 1 && p.out.stride[2] == 1 &&
         p.seqlen >= size && distance % 16 == 0 && (p.x.stride[0] - p.out.stride[0]) % size == 0 &&
         (p.x.stride[1] - p.out.stride[1]) % size == 0 &&
         is_plain(p, p.rows * p.dim * step_vectors(p, size));
}

template <typename T, typename Weight, int kWidth>
void launch_steps(const CausalConv1dFwdParams& p, const Exec& exec) {
  constexpr int64_t kSteps = kVectorSize<T>;
  const int64_t vectors = step_vectors(p, kSteps);
  const int64_t begin = p.initial_state || p.final_state ? kSteps : 0;
  if (begin > 0) launch_tiles<T, 1, kMaxConvWidth>(p, exec, begin);
  launch_kernel(kOp, causal_conv1d_steps_kernel<T, Weight, kWidth>,
                {blocks_for(p.rows * p.dim * vectors, kStepsThreads), kStepsThreads}, exec, p,
                plan_for(p, 1), Divisor(vectors), Divisor(p.dim), begin);
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
    const auto launch = [&](auto* weight_type) {
      using Weight = std::remove_pointer_t<decltype(weight_type)>;
      if (takes_channel_vectors(p, kSize))
        with_vector_width(p.width, [&](auto width) { launch_channels<T, Weight, width>(p, exec); });
      else if (takes_step_vectors(p, kSize))
        with_vector_width(p.width, [&](auto width) { launch_steps<T, Weight, width>(p, exec); });
      else
        launch_tiles<T, 1, kMaxConvWidth>(p, exec);
    };
    if (p.weight_dtype == p.dtype)
      launch(type);
    else
      launch(static_cast<float*>(nullptr));
  });
}

}  // namespace ssmcore::cuda
