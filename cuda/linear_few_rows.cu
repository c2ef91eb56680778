// out = x weightᵀ + bias for few rows, as in decoding: the weight is read once, at the rate of
// memory, in whatever type it is stored. A warp computes a few outputs for all rows of a block;
// where outputs are too few to fill the chip, several warps split in_features between them and add
// up their parts in a fixed order. x is small and comes from the first-level cache, which the
// weight bypasses.
#include "any_type.cuh"
#include "launch.h"
#include "linear_kernels.h"
#include "weight_stream.cuh"

namespace ssmcore::cuda {
namespace {

constexpr int kMinWarps = 4;
constexpr int kMaxWarps = 16;

// Adds the bias to a sum, and stores it.
__device__ __noinline__ void store_output(const LinearParams& p, int64_t row, int64_t output,
                                          float sum) {
  if (p.bias.data) sum += load_element(p.bias.data, p.bias_dtype, output * p.bias.stride[0]);
  store_element(p.out.data, p.out_dtype, row * p.out.stride[0] + output * p.out.stride[1], sum);
}

// Blocks go through all rows before they go on to the next outputs, which are `split` warps' each.
template <typename X, typename W, int kRows>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    linear_few_rows_kernel(LinearParams p, int split, int64_t row_blocks) {
  extern __shared__ Piece rings[];
  __shared__ float parts[kMaxWarps][kRows][kOutputs];
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const int64_t first_row = blockIdx.x % row_blocks * kRows;
  const int64_t first_output = blockIdx.x / row_blocks * (warps / split * kOutputs);

  const X* xs[kRows];  // absent rows repeat the last
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    xs[r] = static_cast<const X*>(p.x.data) + min(first_row + r, p.rows - 1) * p.x.stride[0];

  const WeightStream<W> weight({p.weight, p.out_features, p.in_features, p.weight_row_stride},
                               first_output + warp / split * kOutputs, warp % split, split, rings);
  weight.start();
  float sum[kRows][kOutputs] = {};
  add_products(weight, xs, sum);
  share_sums(sum, parts);
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

template <typename X, typename W, int kRows>
void launch_with(const LinearParams& p, const Exec& exec) {
  const int64_t groups = ceil_div(p.out_features, kOutputs), row_blocks = ceil_div(p.rows, kRows);
  const DeviceState& device = exec.context.cuda();
  const size_t room =
      device.shared_memory_per_block() - sizeof(float) * kMaxWarps * kRows * kOutputs;
  const int split =
      split_for(device.num_sms(), std::min(kMaxWarps, static_cast<int>(room / kRingBytes)),
                groups * row_blocks, ceil_div(p.in_features, kLanes * kVectorSize<W>));
  const int warps = std::max(split, kMinWarps);
  const Grid grid{blocks_for(ceil_div(groups, warps / split) * row_blocks, 1), warps * kLanes,
                  warps * kRingBytes};
  launch_kernel("linear", linear_few_rows_kernel<X, W, kRows>, grid, exec, p, split, row_blocks);
}

bool can_load_16_bytes(const void* data, DType dtype, int64_t rows, int64_t row_stride) {
  return is_aligned(data, 16) && (rows == 1 || row_stride * dtype_size(dtype) % 16 == 0);
}

}  // namespace

int split_for(int num_sms, int max_warps, int64_t groups, int64_t steps) {
  constexpr int kWarpsPerSm = 20;  // that an SM has room for at once
  const int64_t most = std::min<int64_t>(max_warps, kWarpsPerSm * num_sms / groups);
  int split = 1;
  while (split < steps && 2 * split <= most) split *= 2;
  return split;
}

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
