// The kernels of the GPU, as a table.
#include <nvtx3/nvToolsExt.h>

#include "../cpp/src/kernels.h"
#include "device_state.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {

SSMCORE_FOR_EACH_KERNEL(SSMCORE_DECLARE_KERNEL)
SSMCORE_FOR_EACH_GPU_KERNEL(SSMCORE_DECLARE_KERNEL)

namespace {

// Names what it encloses on a profiler's timeline.
class Range {
 public:
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

template <typename Params, void (*kRun)(const Params&, const Exec&)>
void run(const char* name, const Params& params, const Exec& exec) {
  DeviceState& device = exec.context.cuda();
  const DeviceGuard guard(device.index());
  device.raise_faults();
  const Range range(name);
  kRun(params, exec);
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = {
#define SSMCORE_KERNEL_ENTRY(name, Params)               \
  {[](const Params& params, const Exec& exec) {          \
     run<Params, name>("ssmcore::" #name, params, exec); \
   },                                                    \
   name##_workspace_size},
      // clang-format off
      SSMCORE_FOR_EACH_KERNEL(SSMCORE_KERNEL_ENTRY)
      SSMCORE_FOR_EACH_GPU_KERNEL(SSMCORE_KERNEL_ENTRY)
// clang-format on
#undef SSMCORE_KERNEL_ENTRY
  };
  return table;
}

}  // namespace ssmcore::cuda
