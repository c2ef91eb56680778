// One token of a few rows through a whole Mamba layer, in four launches, each limited by reading
// its weights:
//
//   norm, in_proj, convolution and SiLU | x_proj | dt_proj, state update and gate | out_proj, sum
//
// Each begins while the one before is still running and has its first weights on their way by the
// time that one ends.
#include "../cpp/src/kernels.h"
#include "device/dependent_launch.cuh"
#include "device/math.cuh"
#include "device/state.cuh"
#include "launch.h"
#include "weight_stream.cuh"

namespace ssmcore::cuda {
namespace {

constexpr const char* kOp = "mamba_step";
constexpr int kMinWarps = 4, kMaxWarps = 16;
constexpr int kWidth = MambaStepParams::kWidth, kDstate = MambaStepParams::kDstate;
constexpr int kMaxRows = MambaStepParams::kMaxRows;

template <typename T>
__device__ __forceinline__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

__device__ __forceinline__ int64_t slot_of(const MambaStepParams& p, int row) {
  const int64_t slot = p.state_indices[row];
  return slot < p.slots ? slot : -1;
}

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

// Leaves the norm of the residual, (kRows, d_model), in shared memory.
template <typename T, int kRows>
__device__ __forceinline__ void normalise(const MambaStepParams& p, T* normed) {
  __shared__ float squares[kMaxWarps][kRows];
  const int warps = blockDim.x / kLanes, n = static_cast<int>(p.d_model);
  float sum[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= p.rows) break;
    for (int i = 4 * threadIdx.x; i < n; i += 4 * blockDim.x) {
      const auto v = load_vector<4>(p.residual + r * p.d_model + i);
      sum[r] += v.value[0] * v.value[0] + v.value[1] * v.value[1] + v.value[2] * v.value[2] +
                v.value[3] * v.value[3];
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      sum[r] += __shfl_xor_sync(~0u, sum[r], offset);
    if (threadIdx.x % kLanes == 0) squares[threadIdx.x / kLanes][r] = sum[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= p.rows) break;
    float total = 0;
    for (int w = 0; w < warps; ++w) total += squares[w][r];
    const float scale = 1.0f / sqrtf(total / static_cast<float>(n) + p.eps);
    for (int i = 4 * threadIdx.x; i < n; i += 4 * blockDim.x) {
      const auto v = load_vector<4>(p.residual + r * p.d_model + i);
      const auto weight = load_vector<4>(p.norm + i);
      Vector<T, 4> out;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        out.value[k] = from_float<T>(v.value[k] * scale * weight.value[k]);
      store_vector(normed + r * n + i, out);
    }
  }
  __syncthreads();
}

// One channel of the convolution at one row: what it needs besides the input, loaded ahead.
template <typename T>
struct Convolution {
  T* state = nullptr;  // of this channel; null where there is nothing to update
  T history[kWidth - 1] = {};
  float weight[kWidth], bias;

  __device__ Convolution(const MambaStepParams& p, int row, int d) {
    const int64_t slot = slot_of(p, row);
    if (slot >= 0) {
      state = static_cast<T*>(p.conv_state) + slot * p.conv_state_stride + d;
#pragma unroll
      for (int k = 0; k < kWidth - 1; ++k) history[k] = state[k * p.dim];
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) weight[k] = p.conv_weight[k * p.dim + d];
    bias = p.conv_bias ? p.conv_bias[d] : 0.0f;
  }

  __device__ float next(const MambaStepParams& p, T x) const {
    float sum = bias;
#pragma unroll
    for (int k = 0; k < kWidth - 1; ++k) sum = fmaf(weight[k], to_float(history[k]), sum);
    sum = fmaf(weight[kWidth - 1], to_float(x), sum);
    if (state) {
#pragma unroll
      for (int k = 0; k < kWidth - 2; ++k) state[k * p.dim] = history[k + 1];
      state[(kWidth - 2) * p.dim] = x;
    }
    return silu(sum);
  }
};

template <typename T, int kRows>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    mamba_step_in_proj_kernel(const __grid_constant__ MambaStepParams p, int split) {
  extern __shared__ Piece rings[];
  __shared__ Parts<kRows> parts;
  let_next_launch_begin();
  const auto weight = stream_of<T>(p.in_proj, 2 * p.dim, p.d_model, split, rings);
  weight.start();
  T* normed = reinterpret_cast<T*>(rings + blockDim.x / kLanes * kRingSize);
  wait_for_launch_before();
  normalise<T, kRows>(p, normed);
  const T* xs[kRows];  // absent rows repeat the last
#pragma unroll
  for (int r = 0; r < kRows; ++r) xs[r] = normed + min(r, static_cast<int>(p.rows) - 1) * p.d_model;
  const int dim = static_cast<int>(p.dim);
  const Output output(static_cast<int>(p.rows), kRows, 2 * p.dim, split);
  const bool is_x = output.exists && output.column < dim;
  const Convolution<T> convolution(p, is_x ? output.row : 0, is_x ? output.column : 0);

  float sum[kRows][kOutputs] = {};
  add_products(weight, xs, sum);
  share_sums(sum, parts);
  if (!output.exists) return;
  float total = total_of<kRows>(output, split, parts);
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

// A block has 32 channels, in each of its 4 warps: a warp has a quarter of dt_rank, then of the
// states.
constexpr int kQuarters = 4, kStatesOfThread = kDstate / kQuarters;
constexpr int kMaxPieces = 5;  // of a quarter of a row of dt_proj

template <typename T, int kRows>
__global__ void __launch_bounds__(kQuarters* kLanes)
    mamba_step_update_kernel(const __grid_constant__ MambaStepParams p, uint32_t* faults) {
  constexpr int kSize = kVectorSize<T>;
  extern __shared__ float delta_B_C[];  // (rows, dt_rank + 2 kDstate)
  __shared__ float parts[kQuarters][kRows][kLanes];
  const int quarter = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t d = int64_t{blockIdx.x} * kLanes + lane;
  const bool exists = d < p.dim;
  const int64_t channel = exists ? d : 0;
  const int rank = static_cast<int>(p.dt_rank), length = rank + 2 * kDstate;
  const int first_n = quarter * kStatesOfThread;
  let_next_launch_begin();

  // Weights do not wait for anybody.
  Vector<T, kSize> weight[kMaxPieces];
  const int pieces = rank / kSize;
  const T* weight_row = static_cast<const T*>(p.dt_proj) + channel * rank;
#pragma unroll
  for (int i = 0; i < kMaxPieces; ++i)
    if (quarter + i * kQuarters < pieces)
      weight[i] = load_vector<kSize>(weight_row + (quarter + i * kQuarters) * kSize);
  float A[kStatesOfThread];
#pragma unroll
  for (int n = 0; n < kStatesOfThread; ++n) A[n] = rate_of(p.A[(first_n + n) * p.dim + channel]);
  const float bias = p.dt_bias[channel], D = p.D[channel];
  wait_for_launch_before();

  float h[kRows][kStatesOfThread], u[kRows], z[kRows];
  float* states[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    states[r] = nullptr;
    if (r >= p.rows) break;
    if (p.state_indices[r] >= p.slots && threadIdx.x == 0)
      report(faults, Fault::selective_scan_state_indices);
    const int64_t slot = slot_of(p, r);
    if (slot >= 0) states[r] = p.ssm_state + slot * p.ssm_state_stride + channel;
#pragma unroll
    for (int n = 0; n < kStatesOfThread; ++n)
      h[r][n] = states[r] ? states[r][(first_n + n) * p.dim] : 0.0f;
    u[r] = to_float(static_cast<const T*>(p.u)[r * p.dim + channel]);
    z[r] = to_float(static_cast<const T*>(p.z)[r * p.dim + channel]);
  }
  for (int i = threadIdx.x; i < p.rows * length; i += kQuarters * kLanes)
    delta_B_C[i] = p.delta_B_C[i];
  __syncthreads();

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= p.rows) break;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kMaxPieces; ++i) {
      const int piece = quarter + i * kQuarters;
      if (piece >= pieces) break;
#pragma unroll
      for (int k = 0; k < kSize; ++k)
        sum = fmaf(to_float(weight[i].value[k]), delta_B_C[r * length + piece * kSize + k], sum);
    }
    parts[quarter][r][lane] = sum;
  }
  __syncthreads();
  float y[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= p.rows) break;
    float sum = 0;
#pragma unroll
    for (int q = 0; q < kQuarters; ++q) sum += parts[q][r][lane];
    const float delta = softplus(rounded<T>(sum) + bias);
    const float* B = delta_B_C + r * length + rank + first_n;
    y[r] = 0;
#pragma unroll
    for (int n = 0; n < kStatesOfThread; ++n) {
      h[r][n] = advance(decay(delta, A[n]), h[r][n], delta * u[r], B[n]);
      y[r] += B[kDstate + n] * h[r][n];
      if (states[r] && exists) states[r][(first_n + n) * p.dim] = h[r][n];
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= p.rows) break;
    parts[quarter][r][lane] = y[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= p.rows || r % kQuarters != quarter || !exists) continue;
    float sum = D * u[r];
#pragma unroll
    for (int q = 0; q < kQuarters; ++q) sum += parts[q][r][lane];
    static_cast<T*>(p.y)[r * p.dim + d] = from_float<T>(sum * silu(z[r]));
  }
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
                    int64_t inputs, size_t extra_bytes, const Exec& exec) {
  const DeviceState& device = exec.context.cuda();
  const size_t room = device.shared_memory_per_block() - sizeof(Parts<kRows>) -
                      sizeof(float) * kMaxWarps * kRows - extra_bytes;
  const int64_t groups = ceil_div(outputs, kOutputs);
  const int split =
      split_for(device.num_sms(), std::min(kMaxWarps, static_cast<int>(room / kRingBytes)), groups,
                ceil_div(inputs, kLanes * kVectorSize<T>));
  const int warps = std::max(split, kMinWarps);
  Grid grid{blocks_for(groups, warps / split), warps * kLanes, warps * kRingBytes + extra_bytes};
  grid.begins_early = true;
  launch_kernel(kOp, kernel, grid, exec, p, split);
}

template <typename T, int kRows>
void launch_mamba_step(const MambaStepParams& p, const Exec& exec) {
  const int64_t length = p.dt_rank + 2 * kDstate;
  launch_product<T, kRows>(mamba_step_in_proj_kernel<T, kRows>, p, 2 * p.dim, p.d_model,
                           kRows * sizeof(T) * static_cast<size_t>(p.d_model), exec);
  launch_product<T, kRows>(mamba_step_x_proj_kernel<T, kRows>, p, length, p.dim, 0, exec);
  Grid grid{blocks_for(p.dim, kLanes), kQuarters * kLanes,
            sizeof(float) * static_cast<size_t>(p.rows * length)};
  grid.begins_early = true;
  launch_kernel(kOp, mamba_step_update_kernel<T, kRows>, grid, exec, p,
                exec.context.cuda().faults());
  launch_product<T, kRows>(mamba_step_out_proj_kernel<T, kRows>, p, p.d_model, p.dim, 0, exec);
}

}  // namespace

size_t mamba_step_workspace_size(const MambaStepParams& p, const Context& context) {
  const int64_t size = static_cast<int64_t>(dtype_size(p.dtype));
  const bool fits = p.rows <= kMaxRows && p.dt_rank * size <= 16 * kQuarters * kMaxPieces &&
                    p.dt_rank % 8 == 0 && p.d_model % 8 == 0 && p.dim % 8 == 0 &&
                    is_aligned(p.in_proj, 16) && is_aligned(p.x_proj, 16) &&
                    is_aligned(p.dt_proj, 16) && is_aligned(p.out_proj, 16);
  return fits && !context.batch_invariant() ? 0 : kNoKernel;
}

void mamba_step(const MambaStepParams& p, const Exec& exec) {
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (p.rows == 1)
      launch_mamba_step<T, 1>(p, exec);
    else if (p.rows == 2)
      launch_mamba_step<T, 2>(p, exec);
    else
      launch_mamba_step<T, 4>(p, exec);
  });
}

}  // namespace ssmcore::cuda
