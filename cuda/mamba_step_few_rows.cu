// One token of a few rows through a whole Mamba layer, in four launches, each limited by reading
// its weights:
//
//   norm, in_proj, convolution and SiLU | x_proj | dt_proj, state update and gate | out_proj, sum
//
// Each begins while the one before is still running and has its first weights on their way by the
// time that one ends.
#include "launch.h"
#include "mamba_step.cuh"
#include "weight_stream.cuh"

namespace ssmcore::cuda {
namespace {

constexpr const char* kOp = "mamba_step";
constexpr int kMinWarps = 8, kMaxWarps = 16;

// The output of one row that a thread of a product finishes, if there is one for it.
struct Output {
  int row, column;
  bool exists;
  int part;  // its first in the block's sums

  __device__ Output(int rows, int kernel_rows, int64_t columns, int split) {
    const int warps = blockDim.x / kLanes, i = threadIdx.x;
    const int group = i / (kOutputs * kernel_rows);
    row = i / kOutputs % kernel_rows;
    column = (blockIdx.x * (warps / split) + group) * kOutputs + i % kOutputs;
    exists = group < warps / split && row < rows && column < columns;
    part = group * split;
  }
};

template <int kRows>
using Parts = float[kMaxWarps][kRows][kOutputs];

template <int kRows>
__device__ __forceinline__ float total_of(const Output& output, int split,
                                          const Parts<kRows>& parts) {
  float total = 0;
  for (int i = 0; i < split; ++i)
    total += parts[output.part + i][output.row][threadIdx.x % kOutputs];
  return total;
}

template <typename T>
__device__ __forceinline__ WeightStream<T> stream_of(const void* weight, int64_t outputs,
                                                     int64_t inputs, int split, Piece* rings) {
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const int64_t first = (int64_t{blockIdx.x} * (warps / split) + warp / split) * kOutputs;
  return WeightStream<T>({weight, outputs, inputs, inputs}, first, warp % split, split, rings);
}

// The norm of the residual but for its scale, which is one number a row and so can wait until the
// products with it are there.
template <typename T, int kRows>
struct Norm {
  // float16 may not have the range of what is not scaled yet.
  using Element = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float>;
  using Squares = float[kMaxWarps][kRows];

  // Leaves residual times weight, (kRows, d_model), and the warps' sums of squares in shared
  // memory.
  __device__ static void begin(const MambaStepParams& p, Element* unscaled, Squares& squares) {
    const int n = static_cast<int>(p.d_model);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= p.rows) break;
      float sum = 0;
      for (int i = 4 * threadIdx.x; i < n; i += 4 * blockDim.x) {
        const auto v = load_vector<4>(p.residual + r * p.d_model + i);
        const auto weight = load_vector<4>(p.norm + i);
        Vector<Element, 4> out;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          sum = fmaf(v.value[k], v.value[k], sum);
          out.value[k] = from_float<Element>(v.value[k] * weight.value[k]);
        }
        store_vector(unscaled + r * n + i, out);
      }
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(~0u, sum, offset);
      if (threadIdx.x % kLanes == 0) squares[threadIdx.x / kLanes][r] = sum;
    }
    __syncthreads();
  }

  __device__ static float scale(const MambaStepParams& p, const Squares& squares, int row) {
    float total = 0;
    for (int w = 0; w < blockDim.x / kLanes; ++w) total += squares[w][row];
    return 1.0f / sqrtf(total / static_cast<float>(p.d_model) + p.eps);
  }
};

template <typename T, int kRows>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    mamba_step_in_proj_kernel(const __grid_constant__ MambaStepParams p, int split) {
  using Element = typename Norm<T, kRows>::Element;
  extern __shared__ Piece rings[];
  __shared__ Parts<kRows> parts;
  __shared__ typename Norm<T, kRows>::Squares squares;
  let_next_launch_begin();
  const auto weight = stream_of<T>(p.in_proj, 2 * p.dim, p.d_model, split, rings);
  weight.start();
  const int dim = static_cast<int>(p.dim);
  const Output output(static_cast<int>(p.rows), kRows, 2 * p.dim, split);
  const bool is_x = output.exists && output.column < dim;
  // States are as the step before left them: it ended before the first layer of this one began.
  const Convolution<T> convolution(p, is_x ? output.row : 0, is_x ? output.column : 0);
  Element* unscaled = reinterpret_cast<Element*>(rings + blockDim.x / kLanes * kRingSize);
  wait_for_launch_before();
  Norm<T, kRows>::begin(p, unscaled, squares);
  const Element* xs[kRows];  // absent rows repeat the last
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    xs[r] = unscaled + min(r, static_cast<int>(p.rows) - 1) * p.d_model;

  float sum[kRows][kOutputs] = {};
  add_products(weight, xs, sum);
  share_sums(sum, parts);
  if (!output.exists) return;
  float total =
      total_of<kRows>(output, split, parts) * Norm<T, kRows>::scale(p, squares, output.row);
  if (p.in_proj_bias) total += p.in_proj_bias[output.column];
  const int64_t row = output.row * p.dim;
  if (is_x)
    static_cast<T*>(p.u)[row + output.column] =
        from_float<T>(convolution.next(p, from_float<T>(total)));
  else
    static_cast<T*>(p.z)[row + output.column - dim] = from_float<T>(total);
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    mamba_step_x_proj_kernel(const __grid_constant__ MambaStepParams p, int split) {
  extern __shared__ Piece rings[];
  __shared__ Parts<kRows> parts;
  const int64_t outputs = p.dt_rank + 2 * kDstate;
  let_next_launch_begin();
  const auto weight = stream_of<T>(p.x_proj, outputs, p.dim, split, rings);
  weight.start();
  wait_for_launch_before();
  const T* xs[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    xs[r] = static_cast<const T*>(p.u) + min(r, static_cast<int>(p.rows) - 1) * p.dim;
  float sum[kRows][kOutputs] = {};
  add_products(weight, xs, sum);
  share_sums(sum, parts);
  const Output output(static_cast<int>(p.rows), kRows, outputs, split);
  if (output.exists)
    p.delta_B_C[output.row * outputs + output.column] =
        rounded<T>(total_of<kRows>(output, split, parts));
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    mamba_step_out_proj_kernel(const __grid_constant__ MambaStepParams p, int split) {
  extern __shared__ Piece rings[];
  __shared__ Parts<kRows> parts;
  let_next_launch_begin();
  const auto weight = stream_of<T>(p.out_proj, p.d_model, p.dim, split, rings);
  weight.start();
  wait_for_launch_before();
  const T* xs[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    xs[r] = static_cast<const T*>(p.y) + min(r, static_cast<int>(p.rows) - 1) * p.dim;
  const Output output(static_cast<int>(p.rows), kRows, p.d_model, split);
  float* residual = p.residual + (output.exists ? output.row * p.d_model + output.column : 0);
  const float before = *residual;
  float sum[kRows][kOutputs] = {};
  add_products(weight, xs, sum);
  share_sums(sum, parts);
  if (!output.exists) return;
  float total = total_of<kRows>(output, split, parts);
  if (p.out_proj_bias) total += p.out_proj_bias[output.column];
  *residual = before + rounded<T>(total);
}

template <typename T, int kRows>
void launch_product(void (*kernel)(MambaStepParams, int), const MambaStepParams& p, int64_t outputs,
                    int64_t inputs, int max_warps, size_t extra_bytes, const Exec& exec) {
  const DeviceState& device = exec.context.cuda();
  const size_t room = device.shared_memory_per_block() - sizeof(Parts<kRows>) -
                      sizeof(float) * kMaxWarps * kRows - extra_bytes;
  const int64_t groups = ceil_div(outputs, kOutputs);
  const int split =
      split_for(device.num_sms(), std::min(max_warps, static_cast<int>(room / kRingBytes)), groups,
                ceil_div(inputs, kLanes * kVectorSize<T>));
  const int warps = std::max(split, kMinWarps);
  Grid grid{blocks_for(groups, warps / split), warps * kLanes, warps * kRingBytes + extra_bytes};
  grid.begins_early = true;
  launch_kernel(kOp, kernel, grid, exec, p, split);
}

template <typename T, int kRows>
void launch_with(const MambaStepParams& p, const Exec& exec) {
  using Unscaled = typename Norm<T, kRows>::Element;
  const int64_t length = p.dt_rank + 2 * kDstate;
  launch_product<T, kRows>(mamba_step_in_proj_kernel<T, kRows>, p, 2 * p.dim, p.d_model, kMaxWarps,
                           kRows * sizeof(Unscaled) * static_cast<size_t>(p.d_model), exec);
  launch_product<T, kRows>(mamba_step_x_proj_kernel<T, kRows>, p, length, p.dim, kMaxWarps / 2, 0,
                           exec);
  launch_mamba_step_update(p, exec);
  launch_product<T, kRows>(mamba_step_out_proj_kernel<T, kRows>, p, p.d_model, p.dim, kMaxWarps, 0,
                           exec);
}

}  // namespace

void launch_mamba_step_few_rows(const MambaStepParams& p, const Exec& exec) {
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (p.rows == 1)
      launch_with<T, 1>(p, exec);
    else if (p.rows == 2)
      launch_with<T, 2>(p, exec);
    else
      launch_with<T, 4>(p, exec);
  });
}

}  // namespace ssmcore::cuda
