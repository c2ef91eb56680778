// The gradients of matrix products on the GPU: two more products, and the sums of dout's columns.
#include <algorithm>

#include "column_sums.h"
#include "linear_kernels.h"
#include "linear_plans.h"

namespace ssmcore::cuda {

size_t linear_bwd_workspace_size(const LinearBwdParams& p, const Context&) {
  size_t largest = 0;
  if (p.dx) largest = LinearPlans::workspace_size(MatrixProduct::linear_dx(p));
  if (p.dweight)
    largest = std::max(largest, LinearPlans::workspace_size(MatrixProduct::linear_dweight(p)));
  if (p.dbias) largest = std::max(largest, column_sums_workspace_size(p.rows, p.out_features));
  return largest;
}

void linear_bwd(const LinearBwdParams& p, const Exec& exec) {
  // A row of dx stands alone; the other gradients are sums over the rows.
  if (p.dx) multiply(MatrixProduct::linear_dx(p), exec.context.batch_invariant(), exec);
  if (p.dweight) multiply(MatrixProduct::linear_dweight(p), false, exec);
  if (p.dbias)
    launch_column_sums("linear_bwd", p.dout, p.dout_dtype, p.rows, p.out_features, p.dbias, exec);
}

}  // namespace ssmcore::cuda
