// The causal convolution on the GPU, limited by memory: every input is read once, by vectors along
// whichever of channels and steps is contiguous.
#ifndef CONV_UNROLL
#define CONV_UNROLL 8
#endif
#include "causal_conv1d_fwd_tile.cuh"
#include "launch.h"

#ifndef CONV_CH
#define CONV_CH 8
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

namespace ssmcore::cuda {
namespace {

constexpr const char* kOp = "causal_conv1d";
constexpr int kThreads = CONV_THREADS;
constexpr int kMaxVectorWidth = 4;  // wider ones go without vectors
constexpr int64_t kMaxBlockL = CONV_BLOCK_L, kMinBlockL = 8;

// --- Channels contiguous ---------------------------------------------------------------------------

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

// A thread has a tile of a few channels.
template <typename T, int kChannels, int kWidth>
__global__ void __launch_bounds__(kThreads, CONV_MINB)
    causal_conv1d_channels_kernel(const __grid_constant__ CausalConv1dFwdParams p,
                                  const __grid_constant__ CausalConv1dFwdPlan plan,
                                  uint32_t* faults) {
  check_cu_seqlens(p, faults);
  const int64_t lanes = p.dim / kChannels;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t batch = item / (lanes * plan.tiles), rest = item % (lanes * plan.tiles);
  if (batch >= plan.batch) return;
  const int64_t lane = plan.steps_first ? rest / plan.tiles : rest % lanes;
  const int64_t begin = (plan.steps_first ? rest % plan.tiles : rest / lanes) * plan.block_l;
  CausalConv1dTile<T, kChannels, kWidth>(p, plan, faults, batch, lane * kChannels)
      .run(begin, min(begin + plan.block_l, p.seqlen));
}

// --- Steps contiguous ------------------------------------------------------------------------------

constexpr int kChunks = CONV_CHUNKS;  // of a thread
constexpr int kHalo = 4;    // steps before a chunk that are read with it

// How threads lie on rows of steps.
struct StepsPlan {
  int lanes_log2;     // threads side by side in a row
  int64_t row_blocks; // blocks side by side in a row
};

// Whether out at steps [t, t + size) depends on x alone, and on each of the steps before alike.
template <int kWidth>
__device__ bool is_plain(const CausalConv1dFwdParams& p, int64_t batch, int64_t t, int size) {
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

// What is not plain, step by step.
template <typename T, int kWidth>
__device__ __noinline__ void run_steps(const CausalConv1dFwdParams& p,
                                       const CausalConv1dFwdPlan& plan, uint32_t* faults,
                                       int64_t batch, int64_t d, int64_t begin, int64_t end) {
  CausalConv1dTile<T, 1, kWidth, 1>(p, plan, faults, batch, d).run(begin, end);
}

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

  Vector<T, kSteps> inputs[kChunks];
  Vector<T, kHalo> halo[kChunks];
  bool plain[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t t = first + c * lanes * kSteps;
    plain[c] = is_plain<kWidth>(p, batch, t, kSteps);
    halo[c] = {};
    if (plain[c]) inputs[c] = load_vector<kSteps>(x + t);
    if (plain[c] && t > 0) halo[c] = load_vector<kHalo>(x + t - kHalo);
  }
  float weight[kWidth], bias = 0.0f;
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    weight[k] = load_either<T>(p.weight.data, p.weight_dtype,
                               d * p.weight.stride[0] + k * p.weight.stride[1]);
  if (p.bias.data) bias = load_either<T>(p.bias.data, p.bias_dtype, d * p.bias.stride[0]);

#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t t = first + c * lanes * kSteps;
    if (!plain[c]) {
      if (t < p.seqlen && t + kSteps > 0)
        run_steps<T, kWidth>(p, plan, faults, batch, d, max(t, int64_t{0}),
                             min(t + kSteps, p.seqlen));
      continue;
    }
    float window[kHalo + kSteps];
#pragma unroll
    for (int i = 0; i < kHalo; ++i) window[i] = to_float(halo[c].value[i]);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) window[kHalo + i] = to_float(inputs[c].value[i]);
    Vector<T, kSteps> result;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      float sum = bias;
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        sum = fmaf(weight[k], window[kHalo - kWidth + 1 + i + k], sum);
      if (p.activation == Activation::silu) sum = silu(sum);
      result.value[i] = from_float<T>(sum);
    }
    store_vector(out + t, result);
  }
}

// --- Launch ----------------------------------------------------------------------------------------

template <typename Function>
void with_width(int64_t width, const Function& function) {
  if (width == 2)
    function(std::integral_constant<int, 2>());
  else if (width == 3)
    function(std::integral_constant<int, 3>());
  else
    function(std::integral_constant<int, 4>());
}

// Whether the elements of a stride of 1 can be read by vectors of `size`, the other strides being
// the given ones.
template <typename... Stride>
bool has_vectors(const void* data, size_t element, int64_t size, Stride... strides) {
  return is_aligned(data, std::min<size_t>(16, element * static_cast<size_t>(size))) &&
         ((strides % size == 0) && ...);
}

bool states_have_vectors(const Strided<3>& states, size_t element, int64_t size) {
  return !states || size == 1 || (states.stride[1] == 1 &&
                     has_vectors(states.data, element, size, states.stride[0], states.stride[2]));
}

CausalConv1dFwdPlan plan_for(const CausalConv1dFwdParams& p, int64_t channels) {
  CausalConv1dFwdPlan plan{};
  plan.batch = p.cu_seqlens ? 1 : p.rows;
  const size_t element = dtype_size(p.dtype), weight = dtype_size(p.weight_dtype);
  plan.weight_vectors = p.weight.stride[0] == 1 &&
                        has_vectors(p.weight.data, weight, channels, p.weight.stride[1]);
  plan.weight_rows = p.weight.stride[1] == 1 && p.weight.stride[0] == p.width &&
                     has_vectors(p.weight.data, weight, channels);
  plan.bias_vectors = p.bias && p.bias.stride[0] == 1 &&
                      has_vectors(p.bias.data, dtype_size(p.bias_dtype), channels);
  plan.state_vectors = states_have_vectors(p.initial_state, element, channels) &&
                       states_have_vectors(p.final_state, element, channels);
  return plan;
}

template <typename T, int kChannels, int kWidth>
void launch_channels(const CausalConv1dFwdParams& p, bool steps_first, const Exec& exec) {
  CausalConv1dFwdPlan plan = plan_for(p, kChannels);
  plan.steps_first = steps_first;
  // Shorter tiles where the GPU would have too little to do.
  const int64_t threads = plan.batch * (p.dim / kChannels);
  plan.block_l = steps_first ? kMinBlockL : kMaxBlockL;
  while (plan.block_l > kMinBlockL &&
         threads * ceil_div(p.seqlen, plan.block_l) < exec.context.cuda().num_sms() * 1024)
    plan.block_l /= 2;
  plan.tiles = ceil_div(p.seqlen, plan.block_l);
  launch_kernel(kOp, causal_conv1d_channels_kernel<T, kChannels, kWidth>,
                {blocks_for(threads * plan.tiles, kThreads), kThreads}, exec, p, plan,
                exec.context.cuda().faults());
}

template <typename T, int kWidth>
void launch_steps(const CausalConv1dFwdParams& p, const Exec& exec) {
  constexpr int64_t kSteps = kVectorSize<T>;
  const CausalConv1dFwdPlan plan = plan_for(p, 1);
  const bool is_in_phase = has_vectors(p.x.data, sizeof(T), kSteps, p.x.stride[0], p.x.stride[1]);
  const int64_t chunks = ceil_div(p.seqlen + (is_in_phase ? 0 : kSteps - 1), kSteps);
  StepsPlan steps{};
  while ((1 << steps.lanes_log2) < kThreads && (kChunks << steps.lanes_log2) < chunks)
    ++steps.lanes_log2;
  steps.row_blocks = ceil_div(chunks, kChunks << steps.lanes_log2);
  const int64_t rows_per_block = kThreads >> steps.lanes_log2;
  launch_kernel(
      kOp, causal_conv1d_steps_kernel<T, kWidth>,
      {blocks_for(ceil_div(plan.batch * p.dim, rows_per_block) * steps.row_blocks, 1), kThreads},
      exec, p, plan, steps, exec.context.cuda().faults());
}

template <typename T>
void launch_causal_conv1d_fwd(const CausalConv1dFwdParams& p, const Exec& exec) {
  constexpr int kSize = CONV_CH < kVectorSize<T> ? CONV_CH : kVectorSize<T>;
  const Strided<3>&x = p.x, &out = p.out;
  const bool is_narrow = p.width <= kMaxVectorWidth;
  // For a few steps the states are most of the work.
  const bool states_matter = p.seqlen <= kMinBlockL && (p.initial_state || p.final_state);
  const bool by_channels =
      is_narrow && x.stride[1] == 1 && out.stride[1] == 1 && p.dim % kSize == 0 &&
      has_vectors(x.data, sizeof(T), kSize, x.stride[0], x.stride[2]) &&
      has_vectors(out.data, sizeof(T), kSize, out.stride[0], out.stride[2]) &&
      (!states_matter || plan_for(p, kSize).state_vectors);
  const bool by_steps =
      is_narrow && x.stride[2] == 1 && out.stride[2] == 1 && p.seqlen >= kSize &&
      (reinterpret_cast<uintptr_t>(x.data) - reinterpret_cast<uintptr_t>(out.data)) % 16 == 0 &&
      (x.stride[0] - out.stride[0]) % kSize == 0 && (x.stride[1] - out.stride[1]) % kSize == 0;
  if (by_channels)
    with_width(p.width, [&](auto width) { launch_channels<T, kSize, width>(p, false, exec); });
  else if (by_steps)
    with_width(p.width, [&](auto width) { launch_steps<T, width>(p, exec); });
  else
    launch_channels<T, 1, kMaxConvWidth>(p, p.seqlen > 1 && x.stride[2] < x.stride[1], exec);
}

}  // namespace

size_t causal_conv1d_fwd_workspace_size(const CausalConv1dFwdParams&, const Context&) {
  return 0;
}

void causal_conv1d_fwd(const CausalConv1dFwdParams& p, const Exec& exec) {
  with_type(p.dtype, [&](auto* type) {
    launch_causal_conv1d_fwd<std::remove_pointer_t<decltype(type)>>(p, exec);
  });
}

}  // namespace ssmcore::cuda
