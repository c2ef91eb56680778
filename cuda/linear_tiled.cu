// Matrix products in plain float32 arithmetic, for whatever types and strides: a block computes a
// tile of outputs, each thread 8 x 8 of them, from slices of both operands in shared memory. Each
// output is summed by one thread in the order of k.
#include "any_type.cuh"
#include "launch.h"
#include "linear_kernels.h"

namespace ssmcore::cuda {
namespace {

constexpr int kTile = 64;   // of m, and of n
constexpr int kSlice = 16;  // of k
constexpr int kPerThread = 8;
constexpr int kThreads = (kTile / kPerThread) * (kTile / kPerThread);
constexpr int kLoads = kTile * kSlice / kThreads;
// A thread's outputs are two runs of 4 either way, so that a warp reads shared memory in whole
// 16-byte words without conflicts.
constexpr int kRun = 4;
constexpr int kRunStride = kTile / 2;

// (kSlice, kTile), padded so that storing down the columns meets few conflicts.
using Slice = float[kSlice][kTile + 4];

// One operand, of which a block's tile takes rows, of m or n, from `first` on. Neighbouring threads
// read along k, or along the rows where it is these that are adjacent.
template <typename T>
class Operand {
 public:
  __device__ Operand(const MatrixProduct::Matrix& matrix, int64_t rows, int64_t k, int64_t first) {
    const bool along_rows = matrix.stride[0] < matrix.stride[1];
    const int thread = threadIdx.x;
    row_ = along_rows ? thread : thread / kSlice;
    k_ = along_rows ? 0 : thread % kSlice;
    row_step_ = along_rows ? 0 : kThreads / kSlice;
    k_step_ = along_rows ? 1 : 0;
    rows_ = static_cast<int>(min(rows - first - row_, int64_t{kTile}));
    left_ = k - k_;
    k_stride_ = matrix.stride[1];
    step_ = row_step_ * matrix.stride[0] + k_step_ * k_stride_;
    from_ = static_cast<const T*>(matrix.data) + (first + row_) * matrix.stride[0] + k_ * k_stride_;
  }

  // Not converted yet, which would wait for it.
  __device__ void load(int64_t k, T (&values)[kLoads]) const {
    const T* from = from_ + k * k_stride_;
#pragma unroll
    for (int i = 0; i < kLoads; ++i, from += step_)
      values[i] = i * row_step_ < rows_ && k + i * k_step_ < left_ ? *from : from_float<T>(0.0f);
  }

  __device__ void store(const T (&values)[kLoads], Slice& slice) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      slice[k_ + i * k_step_][row_ + i * row_step_] = to_float(values[i]);
  }

 private:
  static_assert(kThreads == kTile && kLoads == kSlice);

  const T* from_;  // of this thread's first
  int row_, k_;    // where that is in the tile
  int row_step_, k_step_;
  int rows_;      // from there on
  int64_t left_;  // of k
  int64_t k_stride_, step_;
};

__device__ void read(const Slice& slice, int k, int begin, float (&values)[kPerThread]) {
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    const auto four = load_vector<kRun>(&slice[k][begin + run * kRunStride]);
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[run * kRun + i] = four.value[i];
  }
}

// Adds the bias, or what is there, to a sum, and stores it.
__device__ __noinline__ void store_output(const MatrixProduct& p, int64_t m, int64_t n, float sum) {
  const int64_t at = m * p.out.stride[0] + n * p.out.stride[1];
  if (p.bias.data) sum += load_element(p.bias.data, p.bias_dtype, n * p.bias.stride[0]);
  if (p.accumulate) sum += load_element(p.out.data, p.out.dtype, at);
  store_element(p.out.data, p.out.dtype, at, sum);
}

template <typename A, typename B>
__global__ void __launch_bounds__(kThreads, 6)
    linear_tiled_kernel(const __grid_constant__ MatrixProduct p, int64_t row_tiles) {
  __shared__ alignas(16) Slice a_slice, b_slice;
  const int64_t first_m = blockIdx.x % row_tiles * kTile;
  const int64_t first_n = blockIdx.x / row_tiles * kTile;
  const Operand<A> a(p.a, p.m, p.k, first_m);
  const Operand<B> b(p.b, p.n, p.k, first_n);
  const int of_m = threadIdx.x / (kTile / kPerThread) * kRun;
  const int of_n = threadIdx.x % (kTile / kPerThread) * kRun;

  float sum[kPerThread][kPerThread] = {};
  A a_next[kLoads];
  B b_next[kLoads];
  a.load(0, a_next);
  b.load(0, b_next);
  for (int64_t k = 0; k < p.k; k += kSlice) {
    a.store(a_next, a_slice);
    b.store(b_next, b_slice);
    __syncthreads();
    a.load(k + kSlice, a_next);
    b.load(k + kSlice, b_next);
#pragma unroll
    for (int i = 0; i < kSlice; ++i) {
      float as[kPerThread], bs[kPerThread];
      read(a_slice, i, of_m, as);
      read(b_slice, i, of_n, bs);
#pragma unroll
      for (int r = 0; r < kPerThread; ++r)
#pragma unroll
        for (int c = 0; c < kPerThread; ++c) sum[r][c] = fmaf(as[r], bs[c], sum[r][c]);
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < kPerThread; ++r) {
    const int64_t m = first_m + of_m + r / kRun * kRunStride + r % kRun;
#pragma unroll
    for (int c = 0; c < kPerThread; ++c) {
      const int64_t n = first_n + of_n + c / kRun * kRunStride + c % kRun;
      if (m < p.m && n < p.n) store_output(p, m, n, sum[r][c]);
    }
  }
}

}  // namespace

void launch_linear_tiled(const MatrixProduct& product, const Exec& exec) {
  with_type(product.a.dtype, [&](auto* a) {
    with_type(product.b.dtype, [&](auto* b) {
      using A = std::remove_pointer_t<decltype(a)>;
      using B = std::remove_pointer_t<decltype(b)>;
      const int64_t row_tiles = ceil_div(product.m, kTile);
      const unsigned blocks = blocks_for(row_tiles * ceil_div(product.n, kTile), 1);
      launch_kernel("linear", linear_tiled_kernel<A, B>, {blocks, kThreads}, exec, product,
                    row_tiles);
    });
  });
}

}  // namespace ssmcore::cuda
