// Launches that begin before the one before them has ended (programmatic dependent launch).
#pragma once

namespace ssmcore::cuda {

// Lets the next launch begin, once every block has come here. It still waits for this one to end
// before it reads what this one writes.
__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits for all launches before this one. Every kernel that is launched early must, before it reads
// or writes what others may be using, and be it only so that those after it wait for them too.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace ssmcore::cuda
