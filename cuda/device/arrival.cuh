// Barriers in shared memory that some threads arrive at and others wait for.
#pragma once

#include <cstdint>

namespace ssmcore::cuda {

// Completes a phase every time `count` threads have arrived.
class Arrival {
 public:
  __device__ __forceinline__ void init(int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address()), "r"(count) : "memory");
  }
  // What this thread has written is seen by those that have waited.
  __device__ __forceinline__ void arrive() {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(address())
                 : "memory");
  }
  // For the end of the phase of this parity: 0 for the first one.
  __device__ __forceinline__ void wait(int parity) const {
    while (!is_over(parity)) {
    }
  }

 private:
  __device__ __forceinline__ bool is_over(int parity) const {
    int over;
#if __CUDA_ARCH__ >= 900  // sleeps for a while
    asm volatile(
        "{ .reg .pred over; mbarrier.try_wait.parity.shared.b64 over, [%1], %2; "
        "selp.s32 %0, 1, 0, over; }"
        : "=r"(over)
        : "r"(address()), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred over; mbarrier.test_wait.parity.shared.b64 over, [%1], %2; "
        "selp.s32 %0, 1, 0, over; }"
        : "=r"(over)
        : "r"(address()), "r"(parity)
        : "memory");
#endif
    return over != 0;
  }
  __device__ __forceinline__ uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&state_));
  }
  uint64_t state_;
};

}  // namespace ssmcore::cuda
