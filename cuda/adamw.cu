// The optimiser's step on the GPU, limited by memory. What clips the gradients is read on the
// device, so that nothing waits for the host.
#include "../cpp/src/adamw_params.h"
#include "device/block_totals.cuh"
#include "launch.h"

namespace ssmcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPerBlock = 1 << 14;  // elements of a partial sum

__device__ double squared(float value) {
  return static_cast<double>(value) * value;
}
// A partial sum.
__device__ double squared(double sum_of_squares) {
  return sum_of_squares;
}

// Block b sums elements [b · per_block, (b + 1) · per_block) into sums[b], in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_of_squares_kernel(const T* x, int64_t numel, int64_t per_block, double* sums) {
  const int64_t begin = blockIdx.x * per_block, end = min(begin + per_block, numel);
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) sum += squared(x[i]);
  __shared__ double of_warps[kThreads / 32];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = warp_sum(threadIdx.x < kThreads / 32 ? of_warps[threadIdx.x] : 0);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) adamw_kernel(AdamWParams p) {
  float scale = 1;
  if (p.sum_of_squares) {
    const double sum = *p.sum_of_squares;
    if (!isfinite(sum)) return;
    const double clipped = p.max_norm / (sqrt(sum) + 1e-6);
    if (p.max_norm > 0 && clipped < 1) scale = static_cast<float>(clipped);
  }
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.numel; i += step) {
    const float g = scale * p.gradient[i];
    const float m = p.exp_avg[i] + p.one_minus_beta1 * (g - p.exp_avg[i]);
    const float v = p.beta2 * p.exp_avg_sq[i] + p.one_minus_beta2 * g * g;
    const float weight =
        p.decay * p.weight[i] - p.step_size * m / (sqrtf(v) * p.sqrt_scale + p.eps);
    p.exp_avg[i] = m;
    p.exp_avg_sq[i] = v;
    p.weight[i] = weight;
    if (p.rounded) static_cast<T*>(p.rounded)[i] = from_float<T>(weight);
  }
}

int64_t count_sums(const SumOfSquaresParams& p) {
  return blocks_for(p.numel, kPerBlock);
}

}  // namespace

size_t sum_of_squares_workspace_size(const SumOfSquaresParams& p, const Context&) {
  return static_cast<size_t>(count_sums(p)) * sizeof(double);
}

void sum_of_squares(const SumOfSquaresParams& p, const Exec& exec) {
  double* sums = static_cast<double*>(exec.workspace);
  const int64_t count = count_sums(p);
  launch_kernel("sum_of_squares", sum_of_squares_kernel<float>,
                {static_cast<unsigned>(count), kThreads}, exec, p.x, p.numel, kPerBlock, sums);
  launch_kernel("sum_of_squares", sum_of_squares_kernel<double>, {1, kThreads}, exec, sums, count,
                count, p.out);
}

size_t adamw_workspace_size(const AdamWParams&, const Context&) {
  return 0;
}

void adamw(const AdamWParams& p, const Exec& exec) {
  with_type(p.rounded_dtype, [&](auto* rounded) {
    using T = std::remove_pointer_t<decltype(rounded)>;
    launch_kernel("adamw", adamw_kernel<T>, {blocks_for(p.numel, kThreads), kThreads}, exec, p);
  });
}

}  // namespace ssmcore::cuda
