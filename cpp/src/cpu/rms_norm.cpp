// The RMS norm on the CPU, a row at a time.
#include "../rms_norm_params.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "float64.h"
#include "row.h"
#include "vec_math.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {
namespace {

constexpr int64_t kTaskRows = 8;

// One worker's memory: rows as floats. Vectors may read and write beyond dim, up to a whole one.
struct Workspace {
  float *x, *residual, *z, *weight;  // (dim)

  Workspace(const RmsNormFwdParams& p, Scratch& scratch) {
    for (float** piece : {&x, &residual, &z, &weight}) *piece = scratch.floats(p.dim + kLanes);
  }

  static size_t bytes(const RmsNormFwdParams& p) {
    Scratch scratch = Scratch::nowhere();
    Workspace(p, scratch);
    return scratch.used();
  }
};

float sum_of_squares(const float* x, int64_t n) {
  Vec sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(x + i) * load(x + i);
  if (i < n) {
    const Vec rest = load_partial(x + i, n - i);
    sum += rest * rest;
  }
  return horizontal_sum(sum);
}

void norm_row(const RmsNormFwdParams& p, const Workspace& w, const float* weight, int64_t row) {
  const auto gate = [&] {
    const float* z = float_row(row_of(p.z, p.z_dtype, row), p.z_dtype, p.z.stride[1], p.dim, w.z);
    for (int64_t i = 0; i < p.dim; i += kLanes) store(w.x + i, load(w.x + i) * silu(load(z + i)));
  };
  load_row(row_of(p.x, p.dtype, row), p.dtype, p.x.stride[1], p.dim, w.x);
  if (p.residual) {
    const float* residual = float_row(row_of(p.residual, p.residual_dtype, row), p.residual_dtype,
                                      p.residual.stride[1], p.dim, w.residual);
    for (int64_t i = 0; i < p.dim; i += kLanes) store(w.x + i, load(w.x + i) + load(residual + i));
  }
  if (p.residual_out)
    store_row(w.x, p.dim, row_of(p.residual_out, p.residual_out_dtype, row), p.residual_out_dtype,
              p.residual_out.stride[1]);
  if (p.z && !p.norm_before_gate) gate();
  for (int64_t begin = 0; begin < p.dim; begin += p.group_size) {
    const float mean = sum_of_squares(w.x + begin, p.group_size) / static_cast<float>(p.group_size);
    const float scale = 1.0f / __builtin_sqrtf(mean + p.eps);
    for (int64_t i = begin; i < begin + p.group_size; ++i) w.x[i] *= scale;
  }
  if (weight)
    for (int64_t i = 0; i < p.dim; i += kLanes) store(w.x + i, load(w.x + i) * load(weight + i));
  if (p.z && p.norm_before_gate) gate();
  store_row(w.x, p.dim, row_of(p.out, p.out_dtype, row), p.out_dtype, p.out.stride[1]);
}

}  // namespace

size_t rms_norm_fwd_workspace_size(const RmsNormFwdParams& p, const Context& context) {
  return Scratch::product(Workspace::bytes(p), static_cast<size_t>(context.num_threads()));
}

void rms_norm_fwd(const RmsNormFwdParams& p, const Exec& exec) {
  if (p.dtype == DType::float64) return rms_norm_fwd_float64(p);
  const size_t bytes = Workspace::bytes(p);
  exec.context.thread_pool().parallel_for(
      (p.rows + kTaskRows - 1) / kTaskRows, workers_with_scratch(exec, bytes, p.rows * p.dim),
      [&](int64_t task, int worker) {
        Scratch scratch(static_cast<char*>(exec.workspace) + worker * bytes);
        const Workspace w(p, scratch);
        for (float* piece : {w.x, w.residual, w.z, w.weight}) store(piece + p.dim, Vec{});
        const float* weight =
            p.weight ? float_row(p.weight.data, p.weight_dtype, p.weight.stride[0], p.dim, w.weight)
                     : nullptr;
        const int64_t begin = task * kTaskRows, end = min(begin + kTaskRows, p.rows);
        for (int64_t row = begin; row < end; ++row) norm_row(p, w, weight, row);
      });
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
