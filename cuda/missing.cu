// Operators whose kernels are not written yet: a clear error each.
#include "../cpp/src/kernels.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {

#define SSMCORE_MISSING_KERNEL(name, Params)                                      \
  void name(const Params&, const Exec&) {                                         \
    throw Error(ErrorCode::unsupported, #name ": not available on CUDA devices"); \
  }                                                                               \
  size_t name##_workspace_size(const Params&, const Context&) {                   \
    return 0;                                                                     \
  }

SSMCORE_MISSING_KERNEL(selective_scan_fwd, SelectiveScanFwdParams)
SSMCORE_MISSING_KERNEL(linear, LinearParams)
SSMCORE_MISSING_KERNEL(sample, SampleParams)

}  // namespace ssmcore::cuda
