// For launchers: types chosen at run time, launches, and the errors of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "device/types.cuh"
#include "device_state.h"
#include "ssmcore/context.h"

namespace ssmcore::cuda {

// Throws Error(device_error), or Error(out_of_memory), that begins with `op`.
void check(cudaError_t status, const char* op);

// Calls `function` with a null pointer to the type of an activation or a weight.
template <typename Function>
void with_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::bfloat16:
      return function(static_cast<bfloat16*>(nullptr));
    case DType::float16:
      return function(static_cast<float16*>(nullptr));
    default:
      return function(static_cast<float*>(nullptr));
  }
}

template <typename Function>
void with_bool(bool value, const Function& function) {
  if (value)
    function(std::true_type());
  else
    function(std::false_type());
}

struct Grid {
  dim3 blocks;
  int threads;
  size_t shared_bytes = 0;
  bool begins_early = false;  // before the launch before it has ended: device/dependent_launch.cuh
  unsigned cluster = 1;       // blocks
};

// Launches on the stream of `exec`; arguments are converted to the kernel's own.
template <typename... Parameters, typename... Args>
void launch_kernel(const char* op, void (*kernel)(Parameters...), const Grid& grid,
                   const Exec& exec, Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(exec.stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (grid.begins_early && exec.context.cuda().can_begin_early()) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = grid.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (grid.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)),
          op);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(std::forward<Args>(args))...),
        op);
}

// Blocks along x for `items`, each taking `per_block`; a kernel whose items may be more than a grid
// can hold loops over them.
inline unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = items / per_block + (items % per_block != 0);
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, INT32_MAX));
}

inline bool is_aligned(const void* data, size_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

}  // namespace ssmcore::cuda
