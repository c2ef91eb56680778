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

size_t linear_workspace_size(const LinearParams& p, const Context&) {
  return p.dtype == p.weight_dtype ? LinearPlans::workspace_size(p) : 0;
}

void linear(const LinearParams& p, const Exec& exec) {
  // Rows beyond the few would be summed in another order.
  const bool may_stream = !exec.context.batch_invariant();
  if (may_stream && has_few_rows(p) && launch_linear_few_rows(p, exec)) return;
  if (p.dtype == p.weight_dtype && exec.context.cuda().linear_plans().run(p, exec)) return;
  launch_linear_tiled(p, exec);
}

}  // namespace ssmcore::cuda
