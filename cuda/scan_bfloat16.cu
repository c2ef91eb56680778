// The selective scan of bfloat16 activations, real A, and B and C that vary in time.
#include "scan_launch.cuh"

namespace ssmcore::cuda {

template void launch_varying_scan<bfloat16>(const SelectiveScanFwdParams&, const ScanPlan&,
                                            const Exec&);

}  // namespace ssmcore::cuda
