// The selective scan of float16 activations, real A, and B and C that vary in time.
#include "scan_launch.cuh"

namespace ssmcore::cuda {

template void launch_varying_scan<float16>(const SelectiveScanFwdParams&, const ScanPlan&,
                                           const Exec&);

}  // namespace ssmcore::cuda
