#include <string>

#include "launch.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {

void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // unless it sticks, it is not the next call's
  const ErrorCode code =
      status == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::device_error;
  throw Error(code, std::string(op) + ": CUDA reports " + cudaGetErrorName(status) + ", " +
                        cudaGetErrorString(status));
}

}  // namespace ssmcore::cuda
