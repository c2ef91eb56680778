// Stands in for cuda/ in a build without it.
#include "kernels.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {

const KernelTable& kernel_table() {
  throw Error(ErrorCode::unsupported, "device cuda: ssmcore was built without CUDA");
}

}  // namespace ssmcore::cuda
