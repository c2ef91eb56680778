// The optimiser's step on the CPU, limited by memory: a block of elements at a time.
#include "../adamw_params.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "row.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {
namespace {

constexpr int64_t kTask = 1 << 14;  // elements, also of each partial sum
constexpr int64_t kBlock = 1024;    // that are rounded while they are in the cache
constexpr int kSums = 16;           // of every 16th element: a vector or two of float64
// What an element costs, in multiply-adds: it waits for memory.
constexpr int64_t kWork = 16;

double sum_of_task(const float* x, int64_t n) {
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int lane = 0; lane < kSums; ++lane) {
      const double value = x[i + lane];
      sums[lane] += value * value;
    }
  for (int lane = 0; i < n; ++i, ++lane) sums[lane] += static_cast<double>(x[i]) * x[i];
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

// Elements [begin, end) of one task.
void update(const AdamWParams& p, int64_t begin, int64_t end, float scale) {
  float* __restrict weight = p.weight;
  float* __restrict exp_avg = p.exp_avg;
  float* __restrict exp_avg_sq = p.exp_avg_sq;
  const float* __restrict gradient = p.gradient;
  for (int64_t i = begin; i < end; ++i) {
    const float g = scale * gradient[i];
    const float m = exp_avg[i] + p.one_minus_beta1 * (g - exp_avg[i]);
    const float v = p.beta2 * exp_avg_sq[i] + p.one_minus_beta2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    weight[i] = p.decay * weight[i] - p.step_size * m / (__builtin_sqrtf(v) * p.sqrt_scale + p.eps);
  }
  if (p.rounded)
    store_row(
        weight + begin, end - begin,
        static_cast<char*>(p.rounded) + begin * static_cast<int64_t>(dtype_size(p.rounded_dtype)),
        p.rounded_dtype, 1);
}

}  // namespace

size_t sum_of_squares_workspace_size(const SumOfSquaresParams& p, const Context&) {
  return static_cast<size_t>(ceil_div(p.numel, kTask)) * sizeof(double);
}

void sum_of_squares(const SumOfSquaresParams& p, const Exec& exec) {
  const int64_t tasks = ceil_div(p.numel, kTask);
  double* sums = static_cast<double*>(exec.workspace);
  exec.context.thread_pool().parallel_for(
      tasks, useful_workers(p.numel, exec.context), [&](int64_t task, int) {
        sums[task] = sum_of_task(p.x + task * kTask, min(kTask, p.numel - task * kTask));
      });
  double sum = 0;
  for (int64_t task = 0; task < tasks; ++task) sum += sums[task];
  *p.out = sum;
}

size_t adamw_workspace_size(const AdamWParams&, const Context&) {
  return 0;
}

void adamw(const AdamWParams& p, const Exec& exec) {
  float scale = 1;
  if (p.sum_of_squares) {
    const double sum = *p.sum_of_squares;
    if (!__builtin_isfinite(sum)) return;
    const double clipped = p.max_norm / (__builtin_sqrt(sum) + 1e-6);
    if (p.max_norm > 0 && clipped < 1) scale = static_cast<float>(clipped);
  }
  exec.context.thread_pool().parallel_for(
      ceil_div(p.numel, kTask), useful_workers(kWork * p.numel, exec.context),
      [&](int64_t task, int) {
        const int64_t end = min((task + 1) * kTask, p.numel);
        for (int64_t begin = task * kTask; begin < end; begin += kBlock)
          update(p, begin, min(begin + kBlock, end), scale);
      });
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
