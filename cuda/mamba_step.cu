// One token of each row through a whole Mamba layer, in four launches, each limited by reading its
// weights or its states:
//
//   norm, in_proj, convolution and SiLU | x_proj | dt_proj, state update and gate | out_proj, sum
//
// Each begins while the one before is still running and has its first weights on their way by the
// time that one ends. Here are the choice among the kernels and the third of the launches.
#include "../cpp/src/kernels.h"
#include "device/state.cuh"
#include "launch.h"
#include "mamba_step.cuh"
#include "weight_stream.cuh"

namespace ssmcore::cuda {
namespace {

constexpr const char* kOp = "mamba_step";

// Rows that plain arithmetic is faster for, or has to do.
int64_t few_rows(DType dtype) {
  return dtype_size(dtype) == 2 ? 2 : 4;
}

// Rows for which whole layers are faster than operators, whose products take more work at a time:
// measured on an H100, at d_model 768 and 2560.
int64_t most_rows(const MambaStepParams& p) {
  return std::min<int64_t>(32, 32768 / p.d_model);
}

// Whether the tensor cores' kernels take the layer.
bool takes_rows(const MambaStepParams& p, const Context& context) {
  return p.rows <= most_rows(p) && dtype_size(p.dtype) == 2 && p.d_model % 64 == 0 &&
         p.dim % 64 == 0 && context.cuda().can_begin_early();
}

// A block has 32 channels, in each of its 4 warps: a warp has a quarter of dt_rank, then of the
// states.
constexpr int kQuarters = 4, kStatesOfThread = kDstate / kQuarters;
constexpr int kMaxPieces = 5;  // of a quarter of a row of dt_proj

template <typename T, int kRows>
__global__ void __launch_bounds__(kQuarters* kLanes)
    mamba_step_update_kernel(const __grid_constant__ MambaStepParams p, uint32_t* faults) {
  constexpr int kSize = kVectorSize<T>;
  extern __shared__ float delta_B_C[];  // (kRows, dt_rank + 2 kDstate)
  __shared__ float parts[kQuarters][kRows][kLanes];
  const int quarter = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t d = int64_t{blockIdx.x} * kLanes + lane;
  const bool exists = d < p.dim;
  const int64_t channel = exists ? d : 0;
  const int rank = static_cast<int>(p.dt_rank), length = rank + 2 * kDstate;
  const int first_n = quarter * kStatesOfThread;
  const int first_row = blockIdx.y * kRows;
  const int rows = min(kRows, static_cast<int>(p.rows) - first_row);
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
  // Nor do states, which are as the step before left them.
  float h[kRows][kStatesOfThread];
  float* states[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    states[r] = nullptr;
    if (r >= rows) break;
    if (p.state_indices[first_row + r] >= p.slots && threadIdx.x == 0)
      report(faults, Fault::selective_scan_state_indices);
    const int64_t slot = slot_of(p, first_row + r);
    if (slot >= 0) states[r] = p.ssm_state + slot * p.ssm_state_stride + channel;
#pragma unroll
    for (int n = 0; n < kStatesOfThread; ++n)
      h[r][n] = states[r] ? states[r][(first_n + n) * p.dim] : 0.0f;
  }
  wait_for_launch_before();

  float u[kRows], z[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    u[r] = to_float(static_cast<const T*>(p.u)[(first_row + r) * p.dim + channel]);
    z[r] = to_float(static_cast<const T*>(p.z)[(first_row + r) * p.dim + channel]);
  }
  for (int i = threadIdx.x; i < rows * length; i += kQuarters * kLanes)
    delta_B_C[i] = p.delta_B_C[first_row * length + i];
  __syncthreads();

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
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
    if (r >= rows) break;
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
    if (r >= rows) break;
    parts[quarter][r][lane] = y[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows || r % kQuarters != quarter || !exists) continue;
    float sum = D * u[r];
#pragma unroll
    for (int q = 0; q < kQuarters; ++q) sum += parts[q][r][lane];
    static_cast<T*>(p.y)[(first_row + r) * p.dim + d] = from_float<T>(sum * silu(z[r]));
  }
}

template <typename T, int kRows>
void launch_with(const MambaStepParams& p, const Exec& exec) {
  Grid grid{dim3(blocks_for(p.dim, kLanes), blocks_for(p.rows, kRows)), kQuarters * kLanes,
            sizeof(float) * static_cast<size_t>(kRows * (p.dt_rank + 2 * kDstate))};
  grid.begins_early = true;
  launch_kernel(kOp, mamba_step_update_kernel<T, kRows>, grid, exec, p,
                exec.context.cuda().faults());
}

}  // namespace

void launch_mamba_step_update(const MambaStepParams& p, const Exec& exec) {
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (p.rows == 1)
      launch_with<T, 1>(p, exec);
    else
      launch_with<T, 4>(p, exec);
  });
}

size_t mamba_step_workspace_size(const MambaStepParams& p, const Context& context) {
  const int64_t rank_bytes = p.dt_rank * static_cast<int64_t>(dtype_size(p.dtype));
  const bool fits = (p.rows <= few_rows(p.dtype) || takes_rows(p, context)) &&
                    rank_bytes <= 16 * kQuarters * kMaxPieces && p.dt_rank % 8 == 0 &&
                    p.d_model % 8 == 0 && p.dim % 8 == 0 && is_aligned(p.in_proj, 16) &&
                    is_aligned(p.x_proj, 16) && is_aligned(p.dt_proj, 16) &&
                    is_aligned(p.out_proj, 16);
  return fits && !context.batch_invariant() ? 0 : kNoKernel;
}

void mamba_step(const MambaStepParams& p, const Exec& exec) {
  if (p.rows <= few_rows(p.dtype))
    launch_mamba_step_few_rows(p, exec);
  else
    launch_mamba_step_rows(p, exec);
}

}  // namespace ssmcore::cuda
