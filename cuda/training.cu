// What training does between the operators, on the GPU.
#include "../cpp/src/parameter_params.h"
#include "../cpp/src/training_loss_params.h"
#include "launch.h"

namespace ssmcore::cuda {
namespace {

constexpr int kTile = 32, kTileRows = 8;
constexpr int kThreads = 1024;

// Tile by tile through shared memory, so that either layout of either side is read and written in
// whole lines.
template <typename T>
__global__ void __launch_bounds__(kTile* kTileRows) parameter_copy_kernel(ParameterCopyParams p) {
  __shared__ float tile[kTile][kTile + 1];
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const int64_t tiles_along = (p.cols + kTile - 1) / kTile;
  const int64_t row = blockIdx.x / tiles_along * kTile, col = blockIdx.x % tiles_along * kTile;
  // Neighbouring threads take neighbours in memory.
  const auto is_along_rows = [](const Strided<2>& tensor) {
    return tensor.stride[0] < tensor.stride[1];
  };
  for (int i = y; i < kTile; i += kTileRows) {
    const int r = is_along_rows(p.from) ? x : i, c = is_along_rows(p.from) ? i : x;
    if (row + r >= p.rows || col + c >= p.cols) continue;
    const float value = static_cast<const float*>(
        p.from.data)[(row + r) * p.from.stride[0] + (col + c) * p.from.stride[1]];
    tile[r][c] = p.map == ParameterMap::negative_exp ? -expf(value) : value;
  }
  __syncthreads();
  for (int i = y; i < kTile; i += kTileRows) {
    const int r = is_along_rows(p.to) ? x : i, c = is_along_rows(p.to) ? i : x;
    if (row + r < p.rows && col + c < p.cols)
      static_cast<T*>(p.to.data)[(row + r) * p.to.stride[0] + (col + c) * p.to.stride[1]] =
          from_float<T>(tile[r][c]);
  }
}

__global__ void __launch_bounds__(kThreads) parameter_product_kernel(ParameterProductParams p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.rows * p.cols) return;
  const int64_t row = at / p.cols, col = at % p.cols;
  const auto element = [&](const Strided<2>& tensor) -> float& {
    return static_cast<float*>(tensor.data)[row * tensor.stride[0] + col * tensor.stride[1]];
  };
  const float product = element(p.a) * element(p.b);
  float& to = element(p.to);
  to = p.to.accumulate ? to + product : product;
}

// The sum of the block's values, for its first thread; in a fixed order.
template <typename T>
__device__ T block_sum(T value) {
  __shared__ T of_warp[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffff, value, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0)
    for (const T part : of_warp) sum += part;
  return sum;
}

// One block.
__global__ void __launch_bounds__(kThreads) loss_weight_kernel(LossWeightParams p) {
  long long count = 0;
  if (p.num_targets == 0)
    for (int64_t row = threadIdx.x; row < p.rows; row += kThreads) {
      const int64_t at = row * p.targets.stride[0];
      const int64_t target = p.index_dtype == DType::int32
                                 ? static_cast<const int32_t*>(p.targets.data)[at]
                                 : static_cast<const int64_t*>(p.targets.data)[at];
      count += target != p.ignore_index;
    }
  count = block_sum(count);
  if (threadIdx.x == 0) *p.weight = 1 / static_cast<float>(p.num_targets ? p.num_targets : count);
}

// One block.
__global__ void __launch_bounds__(kThreads) loss_sum_kernel(LossSumParams p) {
  double sum = 0;
  for (int64_t row = threadIdx.x; row < p.rows; row += kThreads) sum += p.losses[row];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *p.loss = static_cast<float>(sum * *p.weight);
}

}  // namespace

size_t parameter_copy_workspace_size(const ParameterCopyParams&, const Context&) {
  return 0;
}

void parameter_copy(const ParameterCopyParams& p, const Exec& exec) {
  with_type(p.to_dtype, [&](auto* type) {
    launch_kernel(
        "parameter_copy", parameter_copy_kernel<std::remove_pointer_t<decltype(type)>>,
        {blocks_for(ceil_div(p.rows, kTile) * ceil_div(p.cols, kTile), 1), kTile * kTileRows}, exec,
        p);
  });
}

size_t parameter_product_workspace_size(const ParameterProductParams&, const Context&) {
  return 0;
}

void parameter_product(const ParameterProductParams& p, const Exec& exec) {
  launch_kernel("parameter_product", parameter_product_kernel,
                {blocks_for(p.rows * p.cols, kThreads), kThreads}, exec, p);
}

size_t loss_weight_workspace_size(const LossWeightParams&, const Context&) {
  return 0;
}

void loss_weight(const LossWeightParams& p, const Exec& exec) {
  launch_kernel("loss_weight", loss_weight_kernel, {1, kThreads}, exec, p);
}

size_t loss_sum_workspace_size(const LossSumParams&, const Context&) {
  return 0;
}

void loss_sum(const LossSumParams& p, const Exec& exec) {
  launch_kernel("loss_sum", loss_sum_kernel, {1, kThreads}, exec, p);
}

}  // namespace ssmcore::cuda
