// Between selective_scan_varying_fwd.cu, which decides how a scan is spread over the device, and
// scan_launch.cuh, which launches it so.
#pragma once

#include "../cpp/src/selective_scan_params.h"
#include "ssmcore/context.h"

namespace ssmcore::cuda {

struct ScanPlan {
  int lanes;    // of a channel of at most 16 states; more states have their own
  bool crowds;  // whether blocks of 8 lanes have shorter tiles, so that more fit a multiprocessor
  int64_t parts, part_length;
};

// Instantiated for each activation type in a file of its own: they take long to compile.
template <typename T>
void launch_varying_scan(const SelectiveScanFwdParams& params, const ScanPlan& plan,
                         const Exec& exec);

}  // namespace ssmcore::cuda
