// The gradients of matrix products on the CPU: dx(r, i) = Σ_o dout(r, o) weight(o, i) and
// dweight(o, i) = Σ_r dout(r, o) x(r, i), as sums of outer products.
#include "../linear_params.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "float64.h"
#include "outer_products.h"
#include "row.h"
#include "ssmcore/context.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {
namespace {

void multiply(const Factor& a, const Factor& b, int64_t k, int64_t rows, int64_t columns,
              const StridedGradient<2>& to, const Exec& exec) {
  const size_t bytes = ProductWorkspace::bytes();
  const int workers = workers_with_scratch(exec, bytes, k * rows * columns);
  const Tiling tiling(rows, columns, workers);
  const int64_t step = to.stride[1] * static_cast<int64_t>(dtype_size(to.dtype));
  exec.context.thread_pool().parallel_for(tiling.tasks(), workers, [&](int64_t task, int worker) {
    Scratch scratch(static_cast<char*>(exec.workspace) + worker * bytes);
    const ProductWorkspace w(scratch);
    multiply_share(tiling, a, b, k, task, w,
                   [&](int64_t row, int64_t column, const float* values, int64_t count) {
                     store_gradient_row(values, count, row_of(to, to.dtype, row) + column * step,
                                        to.dtype, to.stride[1], to.accumulate);
                   });
  });
}

// dbias: blocks of rows first, and then the blocks.
void sum_rows(const LinearBwdParams& p, const Exec& exec) {
  constexpr int64_t kColumns = 64, kBlockRows = 64;
  const int64_t step = p.dout.stride[1] * static_cast<int64_t>(dtype_size(p.dout_dtype));
  const int64_t to_step = p.dbias.stride[0] * static_cast<int64_t>(dtype_size(p.dbias.dtype));
  exec.context.thread_pool().parallel_for(
      ceil_div(p.out_features, kColumns), useful_workers(p.rows * p.out_features, exec.context),
      [&](int64_t task, int) {
        const int64_t begin = task * kColumns, count = min(kColumns, p.out_features - begin);
        float total[kColumns] = {}, values[kColumns] = {};
        for (int64_t block = 0; block < p.rows; block += kBlockRows) {
          float sum[kColumns] = {};
          for (int64_t row = block; row < min(block + kBlockRows, p.rows); ++row) {
            load_row(row_of(p.dout, p.dout_dtype, row) + begin * step, p.dout_dtype,
                     p.dout.stride[1], count, values);
            for (int64_t i = 0; i < kColumns; ++i) sum[i] += values[i];
          }
          for (int64_t i = 0; i < kColumns; ++i) total[i] += sum[i];
        }
        store_gradient_row(total, count, static_cast<char*>(p.dbias.data) + begin * to_step,
                           p.dbias.dtype, p.dbias.stride[0], p.dbias.accumulate);
      });
}

}  // namespace

size_t linear_bwd_workspace_size(const LinearBwdParams& p, const Context& context) {
  if (p.dout_dtype == DType::float64 || (!p.dx && !p.dweight)) return 0;
  return Scratch::product(ProductWorkspace::bytes(), static_cast<size_t>(context.num_threads()));
}

void linear_bwd(const LinearBwdParams& p, const Exec& exec) {
  if (p.dout_dtype == DType::float64) return linear_bwd_float64(p);
  const Factor dout_by_row{p.dout.data, p.dout_dtype, p.dout.stride[0], p.dout.stride[1]};
  const Factor dout_by_output{p.dout.data, p.dout_dtype, p.dout.stride[1], p.dout.stride[0]};
  const Factor x{p.x.data, p.x_dtype, p.x.stride[0], p.x.stride[1]};
  const Factor weight{p.weight.data, p.weight_dtype, p.weight.stride[0], p.weight.stride[1]};
  if (p.dx) multiply(dout_by_output, weight, p.out_features, p.rows, p.in_features, p.dx, exec);
  if (p.dweight) multiply(dout_by_row, x, p.rows, p.out_features, p.in_features, p.dweight, exec);
  if (p.dbias) sum_rows(p, exec);
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
