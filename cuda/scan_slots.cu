#include "device/fault.cuh"
#include "launch.h"
#include "scan_slots.h"

namespace ssmcore::cuda {
namespace {

constexpr int kWarp = 32, kWarps = 4;

// A warp has a row.
__global__ void selective_scan_slots_kernel(Strided<1> state_indices, int64_t rows,
                                            uint32_t* faults) {
  for (int64_t row = blockIdx.x * kWarps + threadIdx.x / kWarp; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps)
    report_shared_slot(static_cast<const int32_t*>(state_indices.data), state_indices.stride[0],
                       row, threadIdx.x % kWarp, kWarp, faults, Fault::selective_scan_shared_slot);
}

}  // namespace

void check_scan_slots(const SelectiveScanFwdParams& p, const Exec& exec) {
  if (p.state_indices && p.rows > 1)
    launch_kernel("selective_scan", selective_scan_slots_kernel,
                  {blocks_for(p.rows, kWarps), kWarp * kWarps}, exec, p.state_indices, p.rows,
                  exec.context.cuda().faults());
}

}  // namespace ssmcore::cuda
