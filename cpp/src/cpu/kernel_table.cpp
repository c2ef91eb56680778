// The kernels of one instruction set, as a table.
#include "../kernels.h"

namespace ssmcore::cpu {

SSMCORE_DECLARE_KERNEL(sample, SampleParams)  // compiled once, for every instruction set

namespace SSMCORE_CPU_NAMESPACE {

SSMCORE_FOR_EACH_VECTOR_KERNEL(SSMCORE_DECLARE_KERNEL)

extern const KernelTable table;
const KernelTable table = {
#define SSMCORE_KERNEL_ENTRY(name, Params) {name, name##_workspace_size},
    SSMCORE_FOR_EACH_KERNEL(SSMCORE_KERNEL_ENTRY)
#undef SSMCORE_KERNEL_ENTRY
};

}  // namespace SSMCORE_CPU_NAMESPACE
}  // namespace ssmcore::cpu
