// What the scan's forward and backward look for before they run.
#pragma once

#include "../cpp/src/selective_scan_params.h"

namespace ssmcore::cuda {

// Reports rows that share a slot, in a launch of its own, which a scan, unlike a step, is long
// enough for.
void check_scan_slots(const SelectiveScanFwdParams& params, const Exec& exec);

}  // namespace ssmcore::cuda
