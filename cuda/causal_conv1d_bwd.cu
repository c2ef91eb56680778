// The gradients of the causal convolution on the GPU, limited by memory: x and dout are read once,
// along whichever of channels and steps is contiguous. Sums over steps are kept apart by groups of
// threads and then added in a fixed order.
#include "../cpp/src/scratch.h"
#include "causal_conv1d_bwd_steps.cuh"
#include "causal_conv1d_bwd_walk.cuh"
#include "causal_conv1d_launch.h"
#include "device/dependent_launch.cuh"

namespace ssmcore::cuda {
namespace {

constexpr const char* kOp = "causal_conv1d_bwd";

// --- Channels contiguous, or any layout ----------------------------------------------------------

constexpr int kWalkThreads = 128, kWalkBlocks = 4;  // of a block, and blocks of a multiprocessor

// Adds what `kSums` threads · lanes of a block have, rows of lanes in their order.
template <int kSums, typename Put>
__device__ __forceinline__ void add_rows(const float (&sums)[kSums], int lanes, const Put& put) {
  __shared__ float shared[kSums * kWalkThreads];
#pragma unroll
  for (int i = 0; i < kSums; ++i) shared[i * kWalkThreads + threadIdx.x] = sums[i];
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < kSums * lanes; at += kWalkThreads) {
    const int i = at / lanes, lane = at % lanes;
    float sum = 0.0f;
    for (int row = lane; row < kWalkThreads; row += lanes) sum += shared[i * kWalkThreads + row];
    put(i, lane, sum);
  }
}

// Neighbouring lanes have neighbouring channels; the rows of lanes of a block, and the blocks of
// the same channels, walk through different tiles.
template <typename T, int kChannels, int kWidth, int kAhead>
__global__ void __launch_bounds__(kWalkThreads, kWalkBlocks)
    causal_conv1d_bwd_walk_kernel(const __grid_constant__ CausalConv1dBwdParams p,
                                  const __grid_constant__ CausalConv1dBwdPlan plan,
                                  uint32_t* faults) {
  let_next_launch_begin();
  check_cu_seqlens(p.fwd, faults);
  const int rows = kWalkThreads / plan.lanes;
  const int64_t blocks = (p.fwd.dim / kChannels + plan.lanes - 1) / plan.lanes;
  const int64_t group = blockIdx.x / blocks;
  const int64_t first_d = (blockIdx.x - group * blocks) * plan.lanes * kChannels;
  const int64_t d = first_d + threadIdx.x % plan.lanes * kChannels;
  float sums[(kWidth + 1) * kChannels] = {};
  using Channels = Words<T, kChannels>;
  using Ahead = std::conditional_t<kChannels == 1, RegistersAhead<Channels, kAhead>,
                                   SharedAhead<Channels, kAhead, kWalkThreads>>;
  if (d < p.fwd.dim) {
    const auto ahead = [] {
      if constexpr (kChannels == 1) {
        return Ahead{};
      } else {
        __shared__ typename Ahead::Memory memory;
        return Ahead{memory};
      }
    };
    CausalConv1dWalk<T, kChannels, kWidth, kAhead, Ahead> walk(p, plan, faults, d, ahead());
    for (int64_t item = group * rows + threadIdx.x / plan.lanes; item < plan.items;
         item += plan.groups * rows) {
      const int64_t batch = item / plan.fwd.tiles;
      const int64_t begin = (item - batch * plan.fwd.tiles) * plan.fwd.block_l;
      walk.run(batch, begin, min(begin + plan.fwd.block_l, p.fwd.seqlen));
    }
#pragma unroll
    for (int i = 0; i < (kWidth + 1) * kChannels; ++i)
      sums[i] = walk.sums[i / kChannels][i % kChannels];
  }
  if (!plan.sums) return;
  const int missing = kWidth - static_cast<int>(p.fwd.width);
  add_rows(sums, plan.lanes, [&](int i, int lane, float sum) {
    const int64_t k = i / kChannels - missing;
    const int64_t to = first_d + lane * kChannels + i % kChannels;
    if (k >= 0 && to < p.fwd.dim) plan.sums[(group * (p.fwd.width + 1) + k) * p.fwd.dim + to] = sum;
  });
}

// --- Steps contiguous, every row one sequence ----------------------------------------------------

constexpr int kStepsThreads = 256, kStepsBlocks = 2;

// A warp has tiles of one channel.
template <typename T, int kWidth, int kAhead>
__global__ void __launch_bounds__(kStepsThreads, kStepsBlocks)
    causal_conv1d_bwd_steps_kernel(const __grid_constant__ CausalConv1dBwdParams p,
                                   const __grid_constant__ CausalConv1dBwdPlan plan,
                                   uint32_t* faults) {
  let_next_launch_begin();
  using Channel = CausalConv1dSteps<T, kWidth, kAhead, kStepsThreads>;
  __shared__ typename Channel::Memory memory;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kStepsThreads + threadIdx.x) / kWarp;
  const int64_t group = warp / p.fwd.dim, d = warp - group * p.fwd.dim;
  if (group >= plan.groups) return;
  Channel steps(p, plan, faults, static_cast<int>(d), memory);
  for (int64_t item = group; item < plan.items; item += plan.groups) {
    const int64_t batch = item / plan.fwd.tiles;
    steps.run(batch, item - batch * plan.fwd.tiles);
  }
  if (!plan.sums) return;
#pragma unroll
  for (int k = 0; k <= kWidth; ++k) {
    float sum = steps.sums[k];
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(0xffffffff, sum, offset);
    if (threadIdx.x % kWarp == 0) plan.sums[(group * (kWidth + 1) + k) * p.fwd.dim + d] = sum;
  }
}

// --- Sums ----------------------------------------------------------------------------------------

constexpr int kSumLanes = 32, kSumRows = 8;

// dweight and dbias. A row of a block's threads adds every kSumRows-th group.
template <typename T>
__global__ void __launch_bounds__(kSumLanes* kSumRows)
    causal_conv1d_bwd_sums_kernel(const __grid_constant__ CausalConv1dBwdParams p,
                                  const float* sums, int64_t groups) {
  wait_for_launch_before();
  __shared__ float rows[kSumRows][kSumLanes];
  const int lane = static_cast<int>(threadIdx.x % kSumLanes);
  const int row = static_cast<int>(threadIdx.x / kSumLanes);
  const int64_t size = (p.fwd.width + 1) * p.fwd.dim;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSumLanes + lane;
  float sum = 0.0f;
  if (at < size) {
#pragma unroll 4
    for (int64_t group = row; group < groups; group += kSumRows) sum += sums[group * size + at];
  }
  rows[row][lane] = sum;
  __syncthreads();
  if (row > 0 || at >= size) return;
  for (int i = 1; i < kSumRows; ++i) sum += rows[i][lane];
  const int64_t k = at / p.fwd.dim, d = at - k * p.fwd.dim;
  if (k == p.fwd.width && p.dbias.data) put_gradient<T>(p.dbias, d * p.dbias.stride[0], sum);
  if (k < p.fwd.width && p.dweight.data)
    put_gradient<T>(p.dweight, d * p.dweight.stride[0] + k * p.dweight.stride[1], sum);
}

// --- Launch --------------------------------------------------------------------------------------

// Without strides over one element, which keep nothing from being aligned.
CausalConv1dBwdParams without_idle_strides(CausalConv1dBwdParams p) {
  for (Strided<3>* tensor : {&p.fwd.x, &p.dout, static_cast<Strided<3>*>(&p.dx)}) {
    if (p.fwd.cu_seqlens || p.fwd.rows == 1) tensor->stride[0] = 0;
    if (p.fwd.seqlen == 1) tensor->stride[2] = 0;
  }
  return p;
}

// Whether dx is stored as it is computed, if it has vectors.
bool overwrites_dx(const CausalConv1dBwdParams& p) {
  return p.dx && p.dx.dtype == p.fwd.dtype && !p.dx.accumulate;
}

// Whether threads can take vectors of channels.
bool reads_channel_vectors(const CausalConv1dBwdParams& p, int64_t size) {
  return takes_channel_vectors(p.fwd, size) && has_channel_vectors(p.dout, p.fwd.dtype, size);
}

// Whether `tensor` has the steps of a row contiguous, and x's vectors of them aligned.
bool has_step_vectors(const CausalConv1dFwdParams& p, const Strided<3>& tensor, int64_t size) {
  const auto distance =
      reinterpret_cast<uintptr_t>(p.x.data) - reinterpret_cast<uintptr_t>(tensor.data);
  return tensor.stride[2] == 1 && distance % 16 == 0 &&
         (p.x.stride[0] - tensor.stride[0]) % size == 0 &&
         (p.x.stride[1] - tensor.stride[1]) % size == 0;
}

// Whether warps can take vectors of steps.
bool reads_step_vectors(const CausalConv1dBwdParams& p, int64_t size) {
  const CausalConv1dFwdParams& fwd = p.fwd;
  return fwd.width <= kMaxVectorWidth && fwd.seqlen >= size &&
         std::max({fwd.seqlen, fwd.dim, fwd.rows}) < INT32_MAX / 2 && !fwd.cu_seqlens &&
         !fwd.seq_idx && (fwd.slots == 0 || fwd.state_len == fwd.width - 1) &&
         has_step_vectors(fwd, fwd.x, size) && has_step_vectors(fwd, p.dout, size) &&
         (!p.dx || has_step_vectors(fwd, p.dx, size));
}

enum class Way { channels, steps, any };

Way way_of(const CausalConv1dBwdParams& p) {
  const auto size = static_cast<int64_t>(16 / dtype_size(p.fwd.dtype));
  if (reads_channel_vectors(p, size)) return Way::channels;
  return reads_step_vectors(p, size) ? Way::steps : Way::any;
}

// Of a walk's channels: registers hold a window of each.
constexpr int kWalkBytes = 8;

// How many steps or vectors of the `whole` make a tile, and how many walkers of a channel there are
// then, so that they fill the device, which has room for `room` at once; where rows alone are more,
// up to kMostTimes as many.
void cut(CausalConv1dBwdPlan& plan, double room, int64_t whole, int64_t least, int64_t multiple) {
  constexpr double kMostTimes = 8;
  const auto wanted = static_cast<int64_t>(room) / plan.fwd.batch;
  const int64_t tiles = std::clamp<int64_t>(wanted, 1, ceil_div(whole, least));
  // Beyond a multiple the last of a tile's chunks would be there for the step after it alone.
  plan.fwd.block_l =
      tiles == 1 ? whole : ceil_div(ceil_div(whole, tiles) + 1, multiple) * multiple - 1;
  plan.fwd.tiles = ceil_div(whole, plan.fwd.block_l);
  plan.items = plan.fwd.batch * plan.fwd.tiles;
  const auto most = std::max(static_cast<int64_t>(kMostTimes * room), int64_t{1});
  plan.groups = ceil_div(plan.items, ceil_div(plan.items, most));
}

CausalConv1dBwdPlan plan_walks(const CausalConv1dBwdParams& p, int64_t channels, int64_t size,
                               int64_t num_sms) {
  constexpr int64_t kLeastSteps = 32;
  CausalConv1dBwdPlan plan{};
  plan.fwd = plan_for(p.fwd, size);
  plan.dx_vectors = overwrites_dx(p) && (size == 1 || has_channel_vectors(p.dx, p.fwd.dtype, size));
  plan.lanes = 1;
  while (plan.lanes < kWarp && plan.lanes < p.fwd.dim / channels) plan.lanes *= 2;
  const int64_t rows = kWalkThreads / plan.lanes;
  const int64_t columns = ceil_div(p.fwd.dim / channels, plan.lanes);
  const int64_t room = num_sms * kWalkBlocks * rows;
  cut(plan, static_cast<double>(room) / static_cast<double>(columns), p.fwd.seqlen, kLeastSteps, 1);
  plan.groups = ceil_div(plan.groups, rows);
  plan.blocks = plan.groups * columns;
  return plan;
}

CausalConv1dBwdPlan plan_steps(const CausalConv1dBwdParams& p, int64_t size, int64_t num_sms) {
  constexpr int64_t kWarps = kStepsThreads / kWarp;
  CausalConv1dBwdPlan plan{};
  plan.fwd = plan_for(p.fwd, 1);
  plan.dx_vectors = overwrites_dx(p);
  const int64_t room = num_sms * kStepsBlocks * kWarps;
  cut(plan, static_cast<double>(room) / static_cast<double>(p.fwd.dim), step_vectors(p.fwd, size),
      kWarp - 1, kWarp);
  plan.blocks = ceil_div(plan.groups * p.fwd.dim, kWarps);
  return plan;
}

CausalConv1dBwdPlan plan_of(const CausalConv1dBwdParams& p, Way way, const Context& context) {
  const auto size = static_cast<int64_t>(16 / dtype_size(p.fwd.dtype));
  const int64_t num_sms = context.cuda().num_sms();
  if (way == Way::steps) return plan_steps(p, size, num_sms);
  return way == Way::channels ? plan_walks(p, kWalkBytes * size / 16, size, num_sms)
                              : plan_walks(p, 1, 1, num_sms);
}

float* carve(const CausalConv1dBwdParams& p, const CausalConv1dBwdPlan& plan, Scratch& scratch) {
  if (!p.dweight && !p.dbias) return nullptr;
  return scratch.floats({plan.groups, p.fwd.width + 1, p.fwd.dim});
}

void launch_rows(void (*kernel)(CausalConv1dBwdParams, CausalConv1dBwdPlan, uint32_t*), int threads,
                 const CausalConv1dBwdParams& p, const CausalConv1dBwdPlan& plan,
                 const Exec& exec) {
  launch_kernel(kOp, kernel, {blocks_for(plan.blocks, 1), threads}, exec, p, plan,
                exec.context.cuda().faults());
}

}  // namespace

size_t causal_conv1d_bwd_workspace_size(const CausalConv1dBwdParams& params,
                                        const Context& context) {
  const CausalConv1dBwdParams p = without_idle_strides(params);
  Scratch scratch = Scratch::nowhere();
  carve(p, plan_of(p, way_of(p), context), scratch);
  return scratch.used();
}

void causal_conv1d_bwd(const CausalConv1dBwdParams& params, const Exec& exec) {
  const CausalConv1dBwdParams p = without_idle_strides(params);
  const Way way = way_of(p);
  CausalConv1dBwdPlan plan = plan_of(p, way, exec.context);
  Scratch scratch(exec.workspace);
  plan.sums = carve(p, plan, scratch);
  with_type(p.fwd.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (way == Way::any)
      launch_rows(causal_conv1d_bwd_walk_kernel<T, 1, kMaxConvWidth, 4>, kWalkThreads, p, plan,
                  exec);
    else
      with_vector_width(p.fwd.width, [&](auto width) {
        if (way == Way::channels)
          launch_rows(causal_conv1d_bwd_walk_kernel<T, kWalkBytes / sizeof(T), width, 8>,
                      kWalkThreads, p, plan, exec);
        else
          launch_rows(causal_conv1d_bwd_steps_kernel<T, width, 4>, kStepsThreads, p, plan, exec);
      });
    if (!plan.sums) return;
    Grid grid{blocks_for((p.fwd.width + 1) * p.fwd.dim, kSumLanes), kSumLanes * kSumRows};
    grid.begins_early = true;
    launch_kernel(kOp, causal_conv1d_bwd_sums_kernel<T>, grid, exec, p, plan.sums, plan.groups);
  });
}

}  // namespace ssmcore::cuda
