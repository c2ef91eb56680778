// The cross entropy and its gradient on the GPU, limited by memory: lanes share a row, whose logits
// each reads once, with the largest so far and the sum of exponentials relative to it. Targets that
// are neither in the vocabulary nor ignore_index are reported, and their rows ignored.
#include "../cpp/src/cross_entropy_params.h"
#include "../cpp/src/scratch.h"
#include "any_type.cuh"
#include "device/lanes.cuh"
#include "device/math.cuh"
#include "launch.h"

namespace ssmcore::cuda {
namespace {

constexpr const char* kForward = "cross_entropy";
constexpr const char* kBackward = "cross_entropy_bwd";
constexpr int kMaxThreads = 512;     // that share a row
constexpr int kSmallThreads = 128;   // of a block of several rows
constexpr int64_t kWarpSize = 2048;  // of a vocabulary whose rows have a warp each
constexpr int kAhead = 4;            // vectors of logits that a thread loads at a time

// The mean sums losses by blocks first: at most kSumBlocks, of at least kMinSumRows rows.
constexpr int kSumThreads = 256;
constexpr int kSumBlocks = kSumThreads;
constexpr int64_t kMinSumRows = 1024;

// A thread's row, and which of the row's lanes it is.
struct Place {
  int64_t row;
  int lane;

  __device__ explicit Place(int lanes)
      : row(static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes),
        lane(threadIdx.x % lanes) {}
};

__device__ int64_t target_at(const CrossEntropyFwdParams& p, int64_t row) {
  const int64_t at = row * p.targets.stride[0];
  return p.index_dtype == DType::int32 ? static_cast<const int32_t*>(p.targets.data)[at]
                                       : static_cast<const int64_t*>(p.targets.data)[at];
}

// -1 where the row is ignored.
__device__ int64_t target_of(const CrossEntropyFwdParams& p, int64_t row) {
  const int64_t target = target_at(p, row);
  return target != p.ignore_index && target >= 0 && target < p.vocab_size ? target : -1;
}

__device__ bool is_fault(const CrossEntropyFwdParams& p, int64_t row) {
  const int64_t target = target_at(p, row);
  return target != p.ignore_index && (target < 0 || target >= p.vocab_size);
}

__device__ float& at(const Strided<1>& tensor, int64_t row) {
  return static_cast<float*>(tensor.data)[row * tensor.stride[0]];
}

__device__ __forceinline__ float exp_of(float x) {
  return exp2_approx(x * kLog2e);
}

// Σ exp(logits) of some logits, relative to the largest.
struct SumOfExp {
  float largest = -INFINITY, sum = 0.0f;

  // What exponents are relative to: no infinity minus itself.
  __device__ float origin() const { return largest == -INFINITY ? 0.0f : largest; }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&logits)[kCount]) {
    const SumOfExp before = *this;
#pragma unroll
    for (const float logit : logits) largest = fmaxf(largest, logit);
    sum = before.sum * exp_of(before.largest - origin());
#pragma unroll
    for (const float logit : logits) sum += exp_of(logit - origin());
  }
};

__device__ SumOfExp combine(const SumOfExp& a, const SumOfExp& b) {
  SumOfExp both;
  both.largest = fmaxf(a.largest, b.largest);
  both.sum = a.sum * exp_of(a.largest - both.origin()) + b.sum * exp_of(b.largest - both.origin());
  return both;
}

// Of all lanes, for each of them, in a fixed order. Every thread of the block must come.
__device__ SumOfExp combine_lanes(SumOfExp mine, int lanes) {
  for (int offset = min(lanes, kWarp) / 2; offset > 0; offset /= 2) {
    SumOfExp other;
    other.largest = __shfl_xor_sync(0xffffffff, mine.largest, offset);
    other.sum = __shfl_xor_sync(0xffffffff, mine.sum, offset);
    mine = combine(mine, other);
  }
  if (lanes <= kWarp) return mine;
  __shared__ float largest[kMaxThreads / kWarp], sums[kMaxThreads / kWarp];
  if (threadIdx.x % kWarp == 0) {
    largest[threadIdx.x / kWarp] = mine.largest;
    sums[threadIdx.x / kWarp] = mine.sum;
  }
  __syncthreads();
  SumOfExp total;
  for (int i = 0; i < lanes / kWarp; ++i) {
    SumOfExp of_warp;
    of_warp.largest = largest[i];
    of_warp.sum = sums[i];
    total = combine(total, of_warp);
  }
  return total;
}

// Calls body(logits, column) for kColumns neighbours at a time, kAhead such loads ahead.
template <typename T, int kColumns, typename Body>
__device__ __forceinline__ void for_each_logits(const CrossEntropyFwdParams& p, const Place& place,
                                                int lanes, const Body& body) {
  const T* logits = static_cast<const T*>(p.logits.data) + place.row * p.logits.stride[0];
  const int64_t step = static_cast<int64_t>(lanes) * kColumns;
  for (int64_t first = place.lane * kColumns; first < p.vocab_size; first += kAhead * step) {
    Words<T, kColumns> next[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (first + k * step < p.vocab_size)
        next[k] = load_words<kColumns>(logits + (first + k * step) * p.logits.stride[1]);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (first + k * step >= p.vocab_size) break;
      float values[kColumns];
      to_floats(next[k], values);
      body(values, first + k * step);
    }
  }
}

// losses (rows): those that the mean sums, or null.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_fwd_kernel(const __grid_constant__ CrossEntropyFwdParams p, int lanes,
                             float* losses, uint32_t* faults) {
  const Place place(lanes);
  const bool exists = place.row < p.rows;
  const int64_t target = exists ? target_of(p, place.row) : -1;
  SumOfExp sum;
  if (exists && (target >= 0 || p.lse.data))
    for_each_logits<T, kColumns>(
        p, place, lanes, [&](const float (&logits)[kColumns], int64_t) { sum.add(logits); });
  sum = combine_lanes(sum, lanes);
  if (!exists || place.lane != 0) return;
  if (is_fault(p, place.row)) report(faults, Fault::cross_entropy_targets);

  // What is near the largest logit is as exact as a small one.
  const float log_of_rest = logf(sum.sum);
  float loss = 0.0f;
  if (target >= 0) {
    const float logit = load_element(p.logits.data, p.dtype,
                                     place.row * p.logits.stride[0] + target * p.logits.stride[1]);
    loss = sum.largest - logit + log_of_rest;
  }
  if (p.lse.data) at(p.lse, place.row) = sum.largest + log_of_rest;
  if (p.loss.data) at(p.loss, place.row) = loss;
  if (losses) losses[place.row] = loss;
}

// The rows that count, and the sum of their losses.
struct Tally {
  double sum;
  int64_t rows;
};

// Of a block's threads, for the first of them, in a fixed order.
__device__ Tally tally_of_block(Tally mine) {
  __shared__ Tally tallies[kSumThreads];
  tallies[threadIdx.x] = mine;
  for (unsigned half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x >= half) continue;
    const Tally& other = tallies[threadIdx.x + half];
    mine = {mine.sum + other.sum, mine.rows + other.rows};
    tallies[threadIdx.x] = mine;
  }
  return mine;
}

__global__ void __launch_bounds__(kSumThreads)
    tally_rows_kernel(const __grid_constant__ CrossEntropyFwdParams p, const float* losses,
                      Tally* tallies) {
  Tally mine{};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * kSumThreads) {
    if (losses) mine.sum += losses[row];
    mine.rows += target_of(p, row) >= 0;
  }
  mine = tally_of_block(mine);
  if (threadIdx.x == 0) tallies[blockIdx.x] = mine;
}

// Of a forward, mean is that of the losses; of a backward, dmean_loss over the number of rows.
__global__ void __launch_bounds__(kSumThreads)
    mean_kernel(const Tally* tallies, int blocks, const float* dmean_loss, float* mean) {
  const Tally total = tally_of_block(threadIdx.x < blocks ? tallies[threadIdx.x] : Tally{});
  if (threadIdx.x != 0) return;
  *mean = dmean_loss ? *dmean_loss / static_cast<float>(total.rows)
                     : static_cast<float>(total.sum / static_cast<double>(total.rows));
}

int sum_blocks(const CrossEntropyFwdParams& p) {
  return static_cast<int>(std::min<int64_t>(kSumBlocks, ceil_div(p.rows, kMinSumRows)));
}

void launch_mean(const char* op, const CrossEntropyFwdParams& p, const float* losses,
                 const float* dmean_loss, Tally* tallies, float* mean, const Exec& exec) {
  const int blocks = sum_blocks(p);
  launch_kernel(op, tally_rows_kernel, {static_cast<unsigned>(blocks), kSumThreads}, exec, p,
                losses, tallies);
  launch_kernel(op, mean_kernel, {1, kSumThreads}, exec, tallies, blocks, dmean_loss, mean);
}

// of_mean: the gradient of every loss, or null: dloss has them.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_bwd_kernel(const __grid_constant__ CrossEntropyBwdParams p, int lanes,
                             const float* of_mean, uint32_t* faults) {
  const CrossEntropyFwdParams& fwd = p.fwd;
  const Place place(lanes);
  if (place.row >= fwd.rows) return;
  if (place.lane == 0 && is_fault(fwd, place.row)) report(faults, Fault::cross_entropy_targets);
  const int64_t target = target_of(fwd, place.row);
  const float dloss = target < 0 ? 0.0f : of_mean ? *of_mean : at(p.dloss, place.row);
  const float lse = target < 0 ? 0.0f : at(fwd.lse, place.row);
  for_each_logits<T, kColumns>(
      fwd, place, lanes, [&](const float (&logits)[kColumns], int64_t column) {
        float dlogits[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          dlogits[i] = target < 0 ? 0.0f : dloss * exp_of(logits[i] - lse);
          if (column + i == target) dlogits[i] -= dloss;
        }
        const StridedGradient<2>& to = p.dlogits;
        const int64_t begin = place.row * to.stride[0] + column * to.stride[1];
        if constexpr (kColumns == kEight) {
          float there[kEight] = {};
          if (to.accumulate) to_floats(load_raw(to.data, to.dtype, begin), to.dtype, there);
#pragma unroll
          for (int i = 0; i < kEight; ++i) dlogits[i] += there[i];
          store_eight(to.data, to.dtype, begin, dlogits);
        } else {
          if (to.accumulate) dlogits[0] += load_element(to.data, to.dtype, begin);
          store_element(to.data, to.dtype, begin, dlogits[0]);
        }
      });
}

bool has_vectors(const CrossEntropyFwdParams& p, const Strided<2>& tensor, DType dtype) {
  return p.vocab_size % kEight == 0 && tensor.stride[1] == 1 &&
         is_aligned(tensor.data, kEight * dtype_size(dtype)) &&
         (p.rows == 1 || tensor.stride[0] % kEight == 0);
}

// For rows of which a thread takes so many neighbours at a time.
struct Division {
  int lanes, threads;
  unsigned blocks;

  Division(const CrossEntropyFwdParams& p, int columns)
      : lanes(lanes_for(ceil_div(p.vocab_size, columns),
                        p.vocab_size <= kWarpSize ? kWarp : kMaxThreads)),
        threads(threads_for(lanes, kSmallThreads)),
        blocks(blocks_for(p.rows, threads / lanes)) {}
};

// Calls function(null pointer to the logits' type, columns) with the columns a thread takes at a
// time, as a constant.
template <typename Function>
void with_columns(DType dtype, bool vectors, const Function& function) {
  with_type(dtype, [&](auto* type) {
    if (vectors)
      function(type, std::integral_constant<int, kEight>());
    else
      function(type, std::integral_constant<int, 1>());
  });
}

// What the mean is made of.
struct Workspace {
  float* losses;  // (rows)
  Tally* tallies;
  float* of_mean;

  Workspace(const CrossEntropyFwdParams& p, Scratch& scratch)
      : losses(p.mean_loss ? scratch.floats(p.rows) : nullptr),
        tallies(static_cast<Tally*>(scratch.bytes(sizeof(Tally) * sum_blocks(p)))),
        of_mean(scratch.floats(1)) {}
};

}  // namespace

size_t cross_entropy_fwd_workspace_size(const CrossEntropyFwdParams& p, const Context&) {
  if (!p.mean_loss) return 0;
  Scratch scratch = Scratch::nowhere();
  Workspace(p, scratch);
  return scratch.used();
}

void cross_entropy_fwd(const CrossEntropyFwdParams& p, const Exec& exec) {
  Scratch scratch(exec.workspace);
  const Workspace w(p, scratch);
  with_columns(p.dtype, has_vectors(p, p.logits, p.dtype), [&](auto* type, auto columns) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kColumns = decltype(columns)::value;
    const Division division(p, kColumns);
    launch_kernel(kForward, cross_entropy_fwd_kernel<T, kColumns>,
                  {division.blocks, division.threads}, exec, p, division.lanes, w.losses,
                  exec.context.cuda().faults());
  });
  if (p.mean_loss)
    launch_mean(kForward, p, w.losses, nullptr, w.tallies, static_cast<float*>(p.mean_loss.data),
                exec);
}

size_t cross_entropy_bwd_workspace_size(const CrossEntropyBwdParams& p, const Context&) {
  if (!p.dmean_loss) return 0;
  Scratch scratch = Scratch::nowhere();
  Workspace(p.fwd, scratch);
  return scratch.used();
}

void cross_entropy_bwd(const CrossEntropyBwdParams& p, const Exec& exec) {
  Scratch scratch(exec.workspace);
  const Workspace w(p.fwd, scratch);
  if (p.dmean_loss)
    launch_mean(kBackward, p.fwd, nullptr, static_cast<const float*>(p.dmean_loss.data), w.tallies,
                w.of_mean, exec);
  const bool vectors = has_vectors(p.fwd, p.fwd.logits, p.fwd.dtype) &&
                       has_vectors(p.fwd, p.dlogits, p.dlogits.dtype);
  with_columns(p.fwd.dtype, vectors, [&](auto* type, auto columns) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kColumns = decltype(columns)::value;
    const Division division(p.fwd, kColumns);
    launch_kernel(kBackward, cross_entropy_bwd_kernel<T, kColumns>,
                  {division.blocks, division.threads}, exec, p, division.lanes,
                  p.dmean_loss ? w.of_mean : nullptr, exec.context.cuda().faults());
  });
}

}  // namespace ssmcore::cuda
