// The selective scan on the GPU: which kernel runs.
#include "../cpp/src/kernels.h"
#include "scan_slots.h"
#include "selective_scan.h"

namespace ssmcore::cuda {

size_t selective_scan_fwd_workspace_size(const SelectiveScanFwdParams& p, const Context& context) {
  if (p.dtype == DType::float64 || is_state_update(p) || !is_varying_scan(p)) return 0;
  return selective_scan_varying_fwd_workspace_size(p, context);
}

void selective_scan_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  if (p.dtype != DType::float64 && is_state_update(p)) return selective_state_update_fwd(p, exec);
  check_scan_slots(p, exec);
  if (p.dtype == DType::float64) return selective_scan_fwd_float64(p, exec);
  if (is_varying_scan(p)) return selective_scan_varying_fwd(p, exec);
  selective_scan_general_fwd(p, exec);
}

}  // namespace ssmcore::cuda
