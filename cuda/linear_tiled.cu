// out = x weightᵀ + bias in plain float32 arithmetic, for whatever types and strides: a block
// computes a tile of outputs, each thread 8 x 8 of them, from slices of x and weight in shared
// memory. Each output is summed by one thread in the order of in_features.
#include "launch.h"
#include "linear_kernels.h"

namespace ssmcore::cuda {
namespace {

constexpr int kTile = 64;   // rows, and outputs
constexpr int kSlice = 16;  // of in_features
constexpr int kPerThread = 8;
constexpr int kThreads = (kTile / kPerThread) * (kTile / kPerThread);
constexpr int kLoads = kTile * kSlice / kThreads;
// A thread's rows, and outputs, are two runs of 4, so that a warp reads shared memory in whole
// 16-byte words without conflicts.
constexpr int kRun = 4;
constexpr int kRunStride = kTile / 2;

// (kSlice, kTile), padded so that storing down the columns meets few conflicts.
using Slice = float[kSlice][kTile + 4];

// One operand, of which a block's tile takes rows from `first` on. Neighbouring threads read along
// in_features.
template <typename T>
class Operand {
 public:
  __device__ Operand(const void* data, int64_t rows, int64_t cols, int64_t row_stride,
                     int64_t col_stride, int64_t first)
      : cols_(cols - threadIdx.x % kSlice),
        row_step_(kRowStep * row_stride),
        col_stride_(col_stride) {
    const int64_t row = first + threadIdx.x / kSlice;
    rows_ = static_cast<int>(min(rows - row, int64_t{kTile}));
    from_ = static_cast<const T*>(data) + row * row_stride + threadIdx.x % kSlice * col_stride;
  }

  // Not converted yet, which would wait for it.
  __device__ void load(int64_t k, T (&values)[kLoads]) const {
    const T* from = from_ + k * col_stride_;
#pragma unroll
    for (int i = 0; i < kLoads; ++i, from += row_step_)
      values[i] = i * kRowStep < rows_ && k < cols_ ? *from : from_float<T>(0.0f);
  }

 private:
  static constexpr int kRowStep = kThreads / kSlice;

  const T* from_;  // of this thread
  int rows_;       // from there on
  int64_t cols_, row_step_, col_stride_;
};

template <typename T>
__device__ void store(const T (&values)[kLoads], Slice& slice) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i)
    slice[threadIdx.x % kSlice][threadIdx.x / kSlice + i * (kThreads / kSlice)] =
        to_float(values[i]);
}

__device__ void read(const Slice& slice, int k, int begin, float (&values)[kPerThread]) {
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    const auto four = load_vector<kRun>(&slice[k][begin + run * kRunStride]);
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[run * kRun + i] = four.value[i];
  }
}

template <typename X, typename W>
__global__ void __launch_bounds__(kThreads, 6)
    linear_tiled_kernel(LinearParams p, int64_t row_tiles) {
  __shared__ alignas(16) Slice x_slice, weight_slice;
  const int64_t first_row = blockIdx.x % row_tiles * kTile;
  const int64_t first_output = blockIdx.x / row_tiles * kTile;
  const Operand<X> x(p.x.data, p.rows, p.in_features, p.x.stride[0], p.x.stride[1], first_row);
  const Operand<W> weight(p.weight, p.out_features, p.in_features, p.weight_row_stride, 1,
                          first_output);
  const int row = threadIdx.x / (kTile / kPerThread) * kRun;
  const int output = threadIdx.x % (kTile / kPerThread) * kRun;

  float sum[kPerThread][kPerThread] = {};
  X x_next[kLoads];
  W weight_next[kLoads];
  x.load(0, x_next);
  weight.load(0, weight_next);
  for (int64_t k = 0; k < p.in_features; k += kSlice) {
    store(x_next, x_slice);
    store(weight_next, weight_slice);
    __syncthreads();
    x.load(k + kSlice, x_next);
    weight.load(k + kSlice, weight_next);
#pragma unroll
    for (int i = 0; i < kSlice; ++i) {
      float xs[kPerThread], weights[kPerThread];
      read(x_slice, i, row, xs);
      read(weight_slice, i, output, weights);
#pragma unroll
      for (int r = 0; r < kPerThread; ++r)
#pragma unroll
        for (int o = 0; o < kPerThread; ++o) sum[r][o] = fmaf(xs[r], weights[o], sum[r][o]);
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < kPerThread; ++r) {
    const int64_t at_row = first_row + row + r / kRun * kRunStride + r % kRun;
#pragma unroll
    for (int o = 0; o < kPerThread; ++o) {
      const int64_t at_output = first_output + output + o / kRun * kRunStride + o % kRun;
      if (at_row < p.rows && at_output < p.out_features)
        store_output(p, at_row, at_output, sum[r][o]);
    }
  }
}

}  // namespace

void launch_linear_tiled(const LinearParams& p, const Exec& exec) {
  with_type(p.dtype, [&](auto* x) {
    with_type(p.weight_dtype, [&](auto* weight) {
      using X = std::remove_pointer_t<decltype(x)>;
      using W = std::remove_pointer_t<decltype(weight)>;
      const int64_t row_tiles = ceil_div(p.rows, kTile);
      const unsigned blocks = blocks_for(row_tiles * ceil_div(p.out_features, kTile), 1);
      launch_kernel("linear", linear_tiled_kernel<X, W>, {blocks, kThreads}, exec, p, row_tiles);
    });
  });
}

}  // namespace ssmcore::cuda
