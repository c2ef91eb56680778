// The backward of the selective scan on the GPU: which kernel runs.
#include "../cpp/src/kernels.h"
#include "selective_scan.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {
namespace {

void require_varying(const SelectiveScanBwdParams& p) {
  if (!is_varying_scan_bwd(p))
    throw Error(ErrorCode::unsupported, "selective_scan_bwd: not on CUDA for this form yet");
}

}  // namespace

size_t selective_scan_bwd_workspace_size(const SelectiveScanBwdParams& p, const Context& context) {
  require_varying(p);
  return selective_scan_varying_bwd_workspace_size(p, context);
}

void selective_scan_bwd(const SelectiveScanBwdParams& p, const Exec& exec) {
  require_varying(p);
  selective_scan_varying_bwd(p, exec);
}

}  // namespace ssmcore::cuda
