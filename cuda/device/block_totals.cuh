// Sums and extremes over a block of 1024 threads, for all of them.
#pragma once

namespace ssmcore::cuda {

// The same in all lanes.
__device__ inline double warp_sum(double value) {
  for (int lanes = 16; lanes > 0; lanes >>= 1) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

// The sum of this lane's value and those of the lanes before it.
__device__ inline double warp_scan(double value) {
  for (unsigned lanes = 1; lanes < 32; lanes *= 2) {
    const double before = __shfl_up_sync(~0u, value, lanes);
    if (threadIdx.x % 32 >= lanes) value += before;
  }
  return value;
}

struct Total {
  unsigned count;
  double sum;
};

// Every call is a barrier, and its results are there until the next but one: the two sets of slots
// take turns.
class BlockTotals {
 public:
  static constexpr int kWarps = 32;
  struct Memory {  // shared
    double sums[2][kWarps];
    unsigned counts[2][kWarps];
  };

  __device__ explicit BlockTotals(Memory& memory) : memory_(memory) {}

  __device__ unsigned count(unsigned mine) {
    share(__reduce_add_sync(~0u, mine));
    return __reduce_add_sync(~0u, memory_.counts[set_][lane()]);
  }
  __device__ unsigned largest(unsigned mine) {
    share(__reduce_max_sync(~0u, mine));
    return __reduce_max_sync(~0u, memory_.counts[set_][lane()]);
  }
  __device__ unsigned smallest(unsigned mine) { return ~largest(~mine); }

  __device__ Total total(unsigned count, double sum) {
    const double of_warp = warp_sum(sum);
    if (lane() == 0) memory_.sums[1 - set_][warp()] = of_warp;
    const unsigned total_count = this->count(count);
    return {total_count, warp_sum(sum_of_warp())};
  }
  // The sum that total() got from the warp of this lane's number.
  __device__ double sum_of_warp() const { return memory_.sums[set_][lane()]; }

  // The sum over all threads before this one.
  __device__ double sum_before(double mine) {
    const double up_to_lane = warp_scan(mine);
    total(0, mine);
    const double up_to_warp = warp_scan(sum_of_warp());
    const double before_warp = __shfl_sync(~0u, up_to_warp, (warp() + 31) % 32);
    const double before_lane = __shfl_up_sync(~0u, up_to_lane, 1);
    return (warp() > 0 ? before_warp : 0) + (lane() > 0 ? before_lane : 0);
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }

  __device__ void share(unsigned of_warp) {
    set_ = 1 - set_;
    if (lane() == 0) memory_.counts[set_][warp()] = of_warp;
    __syncthreads();
  }

  Memory& memory_;
  int set_ = 0;
};

}  // namespace ssmcore::cuda
