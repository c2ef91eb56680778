// The matrix product on the GPU: few rows stream the weight through a kernel of our own, more go to
// cuBLASLt, and what it does not do goes to a plain tiled kernel.
#include "device_state.h"
#include "linear_kernels.h"
#include "linear_plans.h"

namespace ssmcore::cuda {
namespace {

// Of equal types, which cuBLASLt multiplies; others go to the tiled kernel instead, which is only
// better for far more rows.
constexpr int64_t kFewRows = 8;
constexpr int64_t kFewRowsOfMixedTypes = 64;

// The kernel for few rows sums in an order of its own, so that a batch-invariant context does
// without it.
bool has_few_rows(const LinearParams& p, const Context& context) {
  const int64_t few = p.dtype == p.weight_dtype ? kFewRows : kFewRowsOfMixedTypes;
  return p.rows <= few && !context.batch_invariant();
}

}  // namespace

size_t linear_workspace_size(const LinearParams& p, const Context&) {
  return p.dtype == p.weight_dtype ? LinearPlans::workspace_size(p) : 0;
}

void linear(const LinearParams& p, const Exec& exec) {
  if (has_few_rows(p, exec.context) && launch_linear_few_rows(p, exec)) return;
  if (p.dtype == p.weight_dtype && exec.context.cuda().linear_plans().run(p, exec)) return;
  launch_linear_tiled(p, exec);
}

}  // namespace ssmcore::cuda
