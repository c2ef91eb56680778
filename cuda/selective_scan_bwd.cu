// The backward of the selective scan on the GPU: which kernel runs.
#include "../cpp/src/kernels.h"
#include "scan_slots.h"
#include "selective_scan.h"

namespace ssmcore::cuda {

size_t selective_scan_bwd_workspace_size(const SelectiveScanBwdParams& p, const Context& context) {
  return is_varying_scan_bwd(p, context) ? selective_scan_varying_bwd_workspace_size(p, context)
                                         : selective_scan_general_bwd_workspace_size(p, context);
}

void selective_scan_bwd(const SelectiveScanBwdParams& p, const Exec& exec) {
  check_scan_slots(p.fwd, exec);
  if (is_varying_scan_bwd(p, exec.context)) return selective_scan_varying_bwd(p, exec);
  selective_scan_general_bwd(p, exec);
}

}  // namespace ssmcore::cuda
