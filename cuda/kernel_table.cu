// The kernels of the GPU, as a table.
#include <nvtx3/nvToolsExt.h>

#include <string>

#include "../cpp/src/kernels.h"
#include "device_state.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {

SSMCORE_FOR_EACH_FORWARD_KERNEL(SSMCORE_DECLARE_KERNEL)
SSMCORE_FOR_EACH_PLAIN_KERNEL(SSMCORE_DECLARE_KERNEL)
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

[[noreturn]] void fail_gradient(const char* name) {
  throw Error(ErrorCode::unsupported, std::string(name) + ": there are no gradients on CUDA yet");
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = {
#define SSMCORE_KERNEL_ENTRY(name, Params)               \
  {[](const Params& params, const Exec& exec) {          \
     run<Params, name>("ssmcore::" #name, params, exec); \
   },                                                    \
   name##_workspace_size},
#define SSMCORE_NO_GRADIENT(name, Params)                    \
  {[](const Params&, const Exec&) { fail_gradient(#name); }, \
   [](const Params&, const Context&) -> size_t { fail_gradient(#name); }},
      // clang-format off
      SSMCORE_FOR_EACH_FORWARD_KERNEL(SSMCORE_KERNEL_ENTRY)
      SSMCORE_FOR_EACH_GRADIENT_KERNEL(SSMCORE_NO_GRADIENT)
      SSMCORE_FOR_EACH_PLAIN_KERNEL(SSMCORE_KERNEL_ENTRY)
      SSMCORE_FOR_EACH_GPU_KERNEL(SSMCORE_KERNEL_ENTRY)
// clang-format on
#undef SSMCORE_NO_GRADIENT
#undef SSMCORE_KERNEL_ENTRY
  };
  return table;
}

}  // namespace ssmcore::cuda
