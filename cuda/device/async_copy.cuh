// Copies from global to shared memory that a thread waits for later.
#pragma once

#include "types.cuh"

namespace ssmcore::cuda {

// 16 bytes, or as many zeros. They bypass the first-level cache.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool is_there) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(is_there ? 16 : 0)
               : "memory");
}

// 4 or 8 bytes, through the first-level cache, or 16, past it.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2;" ::"r"(address), "l"(from),
                 "n"(kBytes)
                 : "memory");
}

// Ends a group of the thread's copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all but the last kPending groups.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace ssmcore::cuda
