// The kernels of one instruction set, as a table.
#include "../kernels.h"

namespace ssmcore::cpu {

SSMCORE_FOR_EACH_PLAIN_KERNEL(SSMCORE_DECLARE_KERNEL)

namespace SSMCORE_CPU_NAMESPACE {

SSMCORE_FOR_EACH_VECTOR_KERNEL(SSMCORE_DECLARE_KERNEL)

extern const KernelTable table;
const KernelTable table = {
#define SSMCORE_KERNEL_ENTRY(name, Params) {name, name##_workspace_size},
    SSMCORE_FOR_EACH_KERNEL(SSMCORE_KERNEL_ENTRY)
#undef SSMCORE_KERNEL_ENTRY
#define SSMCORE_NO_KERNEL(name, Params) {nullptr, nullptr},
        SSMCORE_FOR_EACH_GPU_KERNEL(SSMCORE_NO_KERNEL)
#undef SSMCORE_NO_KERNEL
};

}  // namespace SSMCORE_CPU_NAMESPACE
}  // namespace ssmcore::cpu
