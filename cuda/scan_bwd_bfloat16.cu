// The backward of the selective scan of bfloat16 activations, real A, and B and C that vary in
// time.
#include "scan_bwd_launch.cuh"

namespace ssmcore::cuda {

template void launch_varying_scan_bwd<bfloat16>(const SelectiveScanBwdParams&, const ScanBwdPlan&,
                                                const ScanBwdWorkspace&, const Exec&);

}  // namespace ssmcore::cuda
