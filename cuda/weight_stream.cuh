// Rows of a weight as a warp streams them from memory, for products with few rows.
#pragma once

#include "device/async_copy.cuh"
#include "device/types.cuh"

namespace ssmcore::cuda {

inline constexpr int kLanes = 32;

// A lane takes a weight row in pieces of 16 bytes, in each step one of as many rows as a warp has
// outputs.
using Piece = Vector<uint32_t, 4>;
inline constexpr int kOutputs = 4;
inline constexpr int kStages = 4;  // steps in flight
inline constexpr int kRingSize = kStages * kOutputs * kLanes;
inline constexpr size_t kRingBytes = kRingSize * sizeof(Piece);

// A matrix (out_features, in_features) whose rows are contiguous.
struct WeightMatrix {
  const void* data;
  int64_t out_features, in_features, row_stride;
};

// kOutputs of its rows from `first` on, as one warp takes them: the steps `begin`, `begin` +
// `stride`, ….
template <typename W>
class WeightStream {
 public:
  static constexpr int kSize = kVectorSize<W>;  // elements of a piece

  __device__ WeightStream(const WeightMatrix& weight, int64_t first, int begin, int stride,
                          Piece* rings)
      : weight_(weight),
        first_(first),
        first_k_((int64_t{begin} * kLanes + threadIdx.x % kLanes) * kSize),
        k_stride_(int64_t{stride} * kLanes * kSize),
        ring_(rings + threadIdx.x / kLanes * kRingSize + threadIdx.x % kLanes) {}

  // Has the first steps on their way.
  __device__ void start() const {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) fetch(first_k_ + stage * k_stride_, stage);
  }

  // After start(): calls use(k, pieces) for each of this lane's steps: the elements of in_features
  // from k on, of every output.
  template <typename Use>
  __device__ void for_each_step(const Use& use) const {
    int stage = 0;
    for (int64_t k = first_k_; k < weight_.in_features; k += k_stride_) {
      wait_for_copies<kStages - 1>();
      Piece pieces[kOutputs];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) pieces[o] = *at(stage, o);
      use(k, pieces);
      fetch(k + kStages * k_stride_, stage);
      stage = (stage + 1) % kStages;
    }
  }

 private:
  __device__ Piece* at(int stage, int o) const { return ring_ + (stage * kOutputs + o) * kLanes; }

  __device__ void fetch(int64_t k, int stage) const {
    const W* from = static_cast<const W*>(weight_.data) + first_ * weight_.row_stride + k;
    if (k < weight_.in_features) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o, from += weight_.row_stride)
        copy_async_16(at(stage, o), from, first_ + o < weight_.out_features);
    }
    commit_copies();
  }

  WeightMatrix weight_;
  int64_t first_, first_k_, k_stride_;
  Piece* ring_;  // of this lane: (kStages, kOutputs, kLanes)
};

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

// Adds the products of kRows rows of x, each a pointer to in_features elements, with the stream's.
template <typename X, typename W, int kRows>
__device__ __forceinline__ void add_products(const WeightStream<W>& weight,
                                             const X* const (&xs)[kRows],
                                             float (&sum)[kRows][kOutputs]) {
  constexpr int kSize = WeightStream<W>::kSize;
  weight.for_each_step([&](int64_t k, const Piece(&pieces)[kOutputs]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float x[kSize];
      load_floats(xs[r] + k, x);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o)
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          sum[r][o] =
              fmaf(x[i], to_float(reinterpret_cast<const W*>(pieces[o].value)[i]), sum[r][o]);
    }
  });
}

// Leaves the sums over the lanes of every warp in `parts`, for all threads of the block to see.
template <int kRows, int kMaxWarps>
__device__ __forceinline__ void share_sums(const float (&sum)[kRows][kOutputs],
                                           float (&parts)[kMaxWarps][kRows][kOutputs]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      float total = sum[r][o];
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2)
        total += __shfl_xor_sync(~0u, total, offset);
      if (threadIdx.x % kLanes == 0) parts[threadIdx.x / kLanes][r][o] = total;
    }
  __syncthreads();
}

// The warps that split in_features between them: as many as the chip and a block have room for, and
// steps to take. `groups` of outputs there are in all.
int split_for(int num_sms, int max_warps, int64_t groups, int64_t steps);

}  // namespace ssmcore::cuda
