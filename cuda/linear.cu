// The matrix product on the GPU: few rows stream the weight through a kernel of our own, more go to
// cuBLASLt, and what it does not do goes to a plain tiled kernel.
#include "device_state.h"
#include "linear_kernels.h"
#include "linear_plans.h"

namespace ssmcore::cuda {
namespace {

// Whether to stream the weight. The bounds were measured on an H100, beside cuBLASLt where the
// types are equal and beside the tiled kernel elsewhere. In 16 bits cuBLASLt keeps the rate of
// memory, but for a single row or few outputs.
bool has_few_rows(const LinearParams& p) {
  if (p.dtype == p.weight_dtype && p.dtype != DType::float32)
    return p.rows == 1 || (p.rows <= 8 && p.out_features <= 1024);
  const int64_t most_outputs = p.dtype == p.weight_dtype ? 50'000 : 600'000;
  return p.rows <= 8 || p.rows * p.out_features <= most_outputs;
}

}  // namespace

void multiply(const MatrixProduct& product, bool batch_invariant, const Exec& exec) {
  if (LinearPlans::takes(product) &&
      exec.context.cuda().linear_plans().run(product, batch_invariant, exec))
    return;
  launch_linear_tiled(product, exec);
}

size_t linear_workspace_size(const LinearParams& p, const Context&) {
  return LinearPlans::workspace_size(MatrixProduct::linear(p));
}

void linear(const LinearParams& p, const Exec& exec) {
  // Rows beyond the few would be summed in another order.
  const bool batch_invariant = exec.context.batch_invariant();
  if (!batch_invariant && has_few_rows(p) && launch_linear_few_rows(p, exec)) return;
  multiply(MatrixProduct::linear(p), batch_invariant, exec);
}

}  // namespace ssmcore::cuda
