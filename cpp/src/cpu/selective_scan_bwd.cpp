// The backward of the selective scan on the CPU.
#include "../selective_scan_params.h"
#include "ssmcore/context.h"
#include "ssmcore/error.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

size_t selective_scan_bwd_workspace_size(const SelectiveScanBwdParams&, const Context&) {
  return 0;
}

void selective_scan_bwd(const SelectiveScanBwdParams&, const Exec&) {
  throw Error(ErrorCode::unsupported, "selective_scan_bwd: not yet");
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
