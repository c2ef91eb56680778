// out = x weightᵀ + bias for few rows, as in decoding: the weight is read once, at the rate of
// memory, in whatever type it is stored. A warp computes a few outputs for all rows of a block;
// where outputs are too few to fill the chip, several warps split in_features between them and add
// up their parts in a fixed order. x is small and comes from the first-level cache, which the
// weight bypasses.
#include "device/async_copy.cuh"
#include "launch.h"
#include "linear_kernels.h"

namespace ssmcore::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kMinWarps = 4;
constexpr int kMaxWarps = 16;
// Warps that an SM has room for at once.
constexpr int kWarpsPerSm = 20;

// A lane takes a weight row in pieces of 16 bytes, in each step one of as many rows as a warp has
// outputs.
using Piece = Vector<uint32_t, 4>;
constexpr int kOutputs = 4;
constexpr int kStages = 4;  // steps in flight
constexpr int kRingSize = kStages * kOutputs * kLanes;
constexpr size_t kRingBytes = kRingSize * sizeof(Piece);

// Some rows of the weight, kOutputs from `first` on, as one warp takes them.
template <typename W>
class WeightStream {
 public:
  static constexpr int kSize = kVectorSize<W>;  // elements of a piece

  __device__ WeightStream(const LinearParams& p, int64_t first, Piece* rings)
      : p_(p),
        first_(first),
        ring_(rings + threadIdx.x / kLanes * kRingSize + threadIdx.x % kLanes) {}

  // Calls use(k, pieces) for each of this lane's steps: the elements of in_features from k on, of
  // every output. The warp takes the steps `begin`, `begin` + `stride`, …
  template <typename Use>
  __device__ void for_each_step(int begin, int stride, const Use& use) const {
    const int64_t first_k = (int64_t{begin} * kLanes + threadIdx.x % kLanes) * kSize;
    const int64_t k_stride = int64_t{stride} * kLanes * kSize;
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) fetch(first_k + stage * k_stride, stage);
    int stage = 0;
    for (int64_t k = first_k; k < p_.in_features; k += k_stride) {
      wait_for_copies<kStages - 1>();
      Piece pieces[kOutputs];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) pieces[o] = *at(stage, o);
      use(k, pieces);
      fetch(k + kStages * k_stride, stage);
      stage = (stage + 1) % kStages;
    }
  }

 private:
  __device__ Piece* at(int stage, int o) const { return ring_ + (stage * kOutputs + o) * kLanes; }

  __device__ void fetch(int64_t k, int stage) const {
    const W* from = static_cast<const W*>(p_.weight) + first_ * p_.weight_row_stride + k;
    if (k < p_.in_features) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o, from += p_.weight_row_stride)
        copy_async_16(at(stage, o), from, first_ + o < p_.out_features);
    }
    commit_copies();
  }

  const LinearParams& p_;
  int64_t first_;
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

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Blocks go through all rows before they go on to the next outputs, which are `split` warps' each.
template <typename X, typename W, int kRows>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    linear_few_rows_kernel(LinearParams p, int split, int64_t row_blocks) {
  constexpr int kSize = kVectorSize<W>;
  extern __shared__ Piece rings[];
  __shared__ float parts[kMaxWarps][kRows][kOutputs];
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const int64_t first_row = blockIdx.x % row_blocks * kRows;
  const int64_t first_output = blockIdx.x / row_blocks * (warps / split * kOutputs);

  const X* xs[kRows];  // absent rows repeat the last
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    xs[r] = static_cast<const X*>(p.x.data) + min(first_row + r, p.rows - 1) * p.x.stride[0];

  float sum[kRows][kOutputs] = {};
  const WeightStream<W> weight(p, first_output + warp / split * kOutputs, rings);
  weight.for_each_step(warp % split, split, [&](int64_t k, const Piece(&pieces)[kOutputs]) {
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

#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const float part = warp_sum(sum[r][o]);
      if (threadIdx.x % kLanes == 0) parts[warp][r][o] = part;
    }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < warps / split * kRows * kOutputs; i += blockDim.x) {
    const int o = i % kOutputs, r = i / kOutputs % kRows, group = i / (kOutputs * kRows);
    const int64_t row = first_row + r, output = first_output + group * kOutputs + o;
    if (row >= p.rows || output >= p.out_features) continue;
    float total = 0;
    for (int part = 0; part < split; ++part) total += parts[group * split + part][r][o];
    store_output(p, row, output, total);
  }
}

// The warps that split in_features between them: as many as there is room for, and steps to take.
int split_for(const DeviceState& device, int64_t blocks, int64_t steps, size_t parts_bytes) {
  const size_t room = (device.shared_memory_per_block() - parts_bytes) / kRingBytes;
  const int64_t most = std::min(
      {int64_t{kMaxWarps}, static_cast<int64_t>(room), kWarpsPerSm * device.num_sms() / blocks});
  int split = 1;
  while (split < steps && 2 * split <= most) split *= 2;
  return split;
}

template <typename X, typename W, int kRows>
void launch_with(const LinearParams& p, const Exec& exec) {
  const int64_t groups = ceil_div(p.out_features, kOutputs), row_blocks = ceil_div(p.rows, kRows);
  const int split = split_for(exec.context.cuda(), groups * row_blocks,
                              ceil_div(p.in_features, kLanes * kVectorSize<W>),
                              sizeof(float) * kMaxWarps * kRows * kOutputs);
  const int warps = std::max(split, kMinWarps);
  const Grid grid{blocks_for(ceil_div(groups, warps / split) * row_blocks, 1), warps * kLanes,
                  warps * kRingBytes};
  launch_kernel("linear", linear_few_rows_kernel<X, W, kRows>, grid, exec, p, split, row_blocks);
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
      if (p.rows == 1)
        launch_with<X, W, 1>(p, exec);
      else if (p.rows <= 4)
        launch_with<X, W, 4>(p, exec);
      else
        launch_with<X, W, 8>(p, exec);
    });
  });
  return true;
}

}  // namespace ssmcore::cuda
