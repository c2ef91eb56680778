// out = x weightᵀ + bias for few rows, as in decoding: the weight is read once, at the rate of
// memory. A block computes some outputs for all of its rows; its warps take the steps along
// in_features in turn, and add up their parts in a fixed order. x is small and comes from the
// first-level cache, which the weight bypasses.
//
// Where x and the weight are both bfloat16, or both float16, tensor cores multiply, which makes any
// number of rows up to 16 as fast as one; other types go through float32 arithmetic.
#include "device/async_copy.cuh"
#include "device/mma.cuh"
#include "launch.h"
#include "linear_kernels.h"

namespace ssmcore::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kMinWarps = 4;
constexpr int kMaxWarps = 16;
// Warps of an SM that together have enough of the weight in flight.
constexpr int kWarpsPerSm = 12;

// A lane takes the weight in pieces of 16 bytes, a few in each step.
using Piece = Vector<uint32_t, 4>;
constexpr int kPieces = 4;
constexpr int kStages = 4;  // steps of a warp that are in flight
constexpr size_t kRingBytes = kStages * kPieces * kLanes * sizeof(Piece);

// Calls use(step, pieces) for every step of this warp. source(step, i) is where piece i comes from,
// or null for zeros.
template <typename Source, typename Use>
__device__ __forceinline__ void stream_weight(int steps, const Source& source, const Use& use) {
  extern __shared__ Piece rings[];  // (warps, kStages, kPieces, kLanes)
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  Piece* const ring = rings + warp * (kStages * kPieces * kLanes) + threadIdx.x % kLanes;
  const auto at = [&](int stage, int i) { return ring + (stage * kPieces + i) * kLanes; };
  const auto fetch = [&](int step, int stage) {
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const void* from = source(step, i);
        copy_async_16(at(stage, i), from, from != nullptr);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) fetch(warp + stage * warps, stage);
  int stage = 0;
  for (int step = warp; step < steps; step += warps) {
    wait_for_copies<kStages - 1>();
    Piece pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = *at(stage, i);
    use(step, pieces);
    fetch(step + kStages * warps, stage);
    stage = (stage + 1) % kStages;
  }
}

// Adds up the warps' parts of kRows x kOutputs sums, in the order of the warps, and stores them.
template <int kRows, int kOutputs>
__device__ __forceinline__ void finish(const LinearParams& p, const float (*parts)[kRows][kOutputs],
                                       int64_t first_row, int64_t first_output) {
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kOutputs; i += blockDim.x) {
    const int r = i / kOutputs, o = i % kOutputs;
    if (first_row + r >= p.rows || first_output + o >= p.out_features) continue;
    float sum = 0;
    for (int warp = 0; warp < blockDim.x / kLanes; ++warp) sum += parts[warp][r][o];
    store_output(p, first_row + r, first_output + o, sum);
  }
}

// --- Tensor cores. Four lanes read along a weight row, each 8 neighbours at a time, of which
// tensor cores take pairs. Which of the in_features they call which does not matter, as long as x
// and the weight agree.

constexpr int kMmaStep = 64;  // of in_features, in two halves
constexpr int kMmaHalf = 32;
constexpr int kMmaTiles = 2;  // of 8 outputs
constexpr int kMmaOutputs = 8 * kMmaTiles;
constexpr int kMmaMaxRows = 16;

template <typename T, int kRows>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    linear_few_rows_mma_kernel(LinearParams p, int steps) {
  constexpr int kGroups = kRows / 8;
  __shared__ float parts[kMaxWarps][kRows][kMmaOutputs];
  const int group = threadIdx.x % kLanes / 4, lane = threadIdx.x % 4;
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * kMmaOutputs;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows;

  const T *weights[kMmaTiles], *xs[kGroups];
  for (int tile = 0; tile < kMmaTiles; ++tile) {
    const int64_t output = min(first_output + tile * 8 + group, p.out_features - 1);
    weights[tile] = static_cast<const T*>(p.weight) + output * p.weight_row_stride + lane * 8;
  }
  for (int i = 0; i < kGroups; ++i) {
    const int64_t row = first_row + i * 8 + group;
    xs[i] =
        row < p.rows ? static_cast<const T*>(p.x.data) + row * p.x.stride[0] + lane * 8 : nullptr;
  }

  float sum[kMmaTiles][4] = {};
  stream_weight(
      steps,
      [&](int step, int i) -> const void* {
        const int64_t k = int64_t{step} * kMmaStep + i % 2 * kMmaHalf;
        return k + lane * 8 < p.in_features ? weights[i / 2] + k : nullptr;
      },
      [&](int step, const Piece(&w)[kPieces]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t k = int64_t{step} * kMmaStep + half * kMmaHalf;
          Piece x[2] = {};  // of rows 0 to 7 and 8 to 15
#pragma unroll
          for (int i = 0; i < kGroups; ++i)
            if (xs[i] && k + lane * 8 < p.in_features)
              x[i] = *reinterpret_cast<const Piece*>(xs[i] + k);
#pragma unroll
          for (int j = 0; j < 4; j += 2) {
            const uint32_t a[4] = {x[0].value[j], x[1].value[j], x[0].value[j + 1],
                                   x[1].value[j + 1]};
#pragma unroll
            for (int tile = 0; tile < kMmaTiles; ++tile) {
              const Piece& piece = w[tile * 2 + half];
              const uint32_t b[2] = {piece.value[j], piece.value[j + 1]};
              mma_16x8x16<T>(sum[tile], a, b);
            }
          }
        }
      });

  const int warp = threadIdx.x / kLanes;
  for (int tile = 0; tile < kMmaTiles; ++tile)
    for (int i = 0; i < 2 * kGroups; ++i)
      parts[warp][i / 2 * 8 + group][tile * 8 + lane * 2 + i % 2] = sum[tile][i];
  finish<kRows, kMmaOutputs>(p, parts, first_row, first_output);
}

// --- Float32 arithmetic. A warp reads along as many weight rows as it has pieces.

template <int N, typename T>
__device__ __forceinline__ void load_floats(const T* from, float (&to)[N]) {
  constexpr int kAtOnce = N < kVectorSize<T> ? N : kVectorSize<T>;
#pragma unroll
  for (int i = 0; i < N; i += kAtOnce) {
    const auto some = load_vector<kAtOnce>(from + i);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) to[i + j] = to_float(some.value[j]);
  }
}

template <typename X, typename W, int kRows>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    linear_few_rows_fma_kernel(LinearParams p, int steps) {
  constexpr int kSize = kVectorSize<W>;
  __shared__ float parts[kMaxWarps][kRows][kPieces];
  const int lane = threadIdx.x % kLanes;
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * kPieces;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows;
  const int rows = static_cast<int>(min(int64_t{kRows}, p.rows - first_row));
  const X* const x = static_cast<const X*>(p.x.data) + first_row * p.x.stride[0];
  const W* const weight = static_cast<const W*>(p.weight) + first_output * p.weight_row_stride;

  float sum[kRows][kPieces] = {};
  const auto first_of = [&](int step) { return (int64_t{step} * kLanes + lane) * kSize; };
  stream_weight(
      steps,
      [&](int step, int o) -> const void* {
        const int64_t k = first_of(step);
        const bool is_there = k < p.in_features && first_output + o < p.out_features;
        return is_there ? weight + o * p.weight_row_stride + k : nullptr;
      },
      [&](int step, const Piece(&pieces)[kPieces]) {
        if (first_of(step) >= p.in_features) return;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) break;
          float xs[kSize];
          load_floats(x + r * p.x.stride[0] + first_of(step), xs);
#pragma unroll
          for (int o = 0; o < kPieces; ++o)
#pragma unroll
            for (int i = 0; i < kSize; ++i)
              sum[r][o] =
                  fmaf(xs[i], to_float(reinterpret_cast<const W*>(pieces[o].value)[i]), sum[r][o]);
        }
      });

  const int warp = threadIdx.x / kLanes;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int o = 0; o < kPieces; ++o) {
      float total = sum[r][o];
      for (int offset = kLanes / 2; offset > 0; offset /= 2)
        total += __shfl_xor_sync(~0u, total, offset);
      if (lane == 0) parts[warp][r][o] = total;
    }
  finish<kRows, kPieces>(p, parts, first_row, first_output);
}

constexpr size_t kMaxPartsBytes = sizeof(float) * kMaxWarps * kMmaMaxRows * kMmaOutputs;

// Blocks of outputs and rows, with warps enough to fill the chip but none without a step to take.
template <typename Kernel>
void launch_few_rows(Kernel* kernel, int outputs, int rows, int step, const LinearParams& p,
                     const Exec& exec) {
  const int64_t steps = ceil_div(p.in_features, step);
  Grid grid;
  grid.blocks = dim3(blocks_for(p.out_features, outputs), blocks_for(p.rows, rows));
  const int64_t wanted =
      std::min(ceil_div(kWarpsPerSm * exec.context.cuda().num_sms(), grid.blocks.x), steps);
  const size_t most = exec.context.cuda().shared_memory_per_block() - kMaxPartsBytes;
  int warps = kMinWarps;
  while (warps < wanted && warps < kMaxWarps && 2 * warps * kRingBytes <= most) warps *= 2;
  grid.threads = warps * kLanes;
  grid.shared_bytes = warps * kRingBytes;
  launch_kernel("linear", kernel, grid, exec, p, steps);
}

// Calls `function` with the rows of a block, as a constant.
template <int kFew, int kMore, typename Function>
void with_rows(int64_t rows, const Function& function) {
  if (rows <= kFew)
    function(std::integral_constant<int, kFew>());
  else
    function(std::integral_constant<int, kMore>());
}

bool can_load_16_bytes(const void* data, DType dtype, int64_t rows, int64_t row_stride) {
  return is_aligned(data, 16) && (rows == 1 || row_stride * dtype_size(dtype) % 16 == 0);
}

}  // namespace

bool launch_linear_few_rows(const LinearParams& p, const Exec& exec) {
  if (p.x.stride[1] != 1 || p.in_features % 8 != 0 ||
      !can_load_16_bytes(p.x.data, p.dtype, p.rows, p.x.stride[0]) ||
      !can_load_16_bytes(p.weight, p.weight_dtype, p.out_features, p.weight_row_stride))
    return false;
  with_type(p.dtype, [&](auto* x) {
    with_type(p.weight_dtype, [&](auto* weight) {
      using X = std::remove_pointer_t<decltype(x)>;
      using W = std::remove_pointer_t<decltype(weight)>;
      if constexpr (std::is_same_v<X, W> && sizeof(X) == 2)
        with_rows<8, kMmaMaxRows>(p.rows, [&](auto rows) {
          launch_few_rows(linear_few_rows_mma_kernel<X, rows>, kMmaOutputs, rows, kMmaStep, p,
                          exec);
        });
      else
        with_rows<1, 8>(p.rows, [&](auto rows) {
          launch_few_rows(linear_few_rows_fma_kernel<X, W, rows>, kPieces, rows,
                          kLanes * kVectorSize<W>, p, exec);
        });
    });
  });
  return true;
}

}  // namespace ssmcore::cuda
