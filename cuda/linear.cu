// The matrix product on the GPU: few rows stream the weight through a kernel of our own, more go to
// cuBLASLt, and what it does not do goes to a plain tiled kernel.
#include "device_state.h"
#include "linear_kernels.h"
#include "linear_plans.h"

namespace ssmcore::cuda {
namespace {

// Whether to stream the weight: the bounds were measured on an H100, beside cuBLASLt where the
// types are equal and beside the tiled kernel elsewhere. cuBLASLt keeps the rate of memory in 16
// bits, but for a single row or few outputs.
bool has_few_rows(const LinearParams& p) {
  const int64_t outputs = p.rows * p.out_features;
  if (p.dtype != p.weight_dtype) return outputs <= 600'000;
  if (p.dtype == DType::float32) return p.rows <= 8 || outputs <= 50'000;
  return p.rows == 1 || (p.rows <= 8 && p.out_features <= 1024);
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
