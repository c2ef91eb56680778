// The selective scan on the GPU: which kernel runs.
#include "../cpp/src/kernels.h"
#include "device/fault.cuh"
#include "launch.h"
#include "selective_scan.h"

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

// In a launch of its own, which a scan, unlike a step, is long enough for.
void check_slots(const SelectiveScanFwdParams& p, const Exec& exec) {
  if (p.state_indices && p.rows > 1)
    launch_kernel("selective_scan", selective_scan_slots_kernel,
                  {blocks_for(p.rows, kWarps), kWarp * kWarps}, exec, p.state_indices, p.rows,
                  exec.context.cuda().faults());
}

}  // namespace

size_t selective_scan_fwd_workspace_size(const SelectiveScanFwdParams& p, const Context& context) {
  if (p.dtype == DType::float64 || is_state_update(p) || !is_varying_scan(p)) return 0;
  return selective_scan_varying_fwd_workspace_size(p, context);
}

void selective_scan_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  if (p.dtype != DType::float64 && is_state_update(p)) return selective_state_update_fwd(p, exec);
  check_slots(p, exec);
  if (p.dtype == DType::float64) return selective_scan_fwd_float64(p, exec);
  if (is_varying_scan(p)) return selective_scan_varying_fwd(p, exec);
  selective_scan_general_fwd(p, exec);
}

}  // namespace ssmcore::cuda
