// Division of integers by a number that the launcher knows, without a division.
#pragma once

#include <cstdint>

namespace ssmcore::cuda {

// ⌊n / d⌋ for 0 ≤ n < 2^31 and 1 ≤ d < 2^31, by the factor 2^32 + `factor_` = ⌈2^(32 + shift) / d⌉
// (Granlund & Montgomery 1994).
class Divisor {
 public:
  explicit Divisor(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while (uint64_t{1} << shift_ < divisor_) ++shift_;
    const uint64_t excess = (uint64_t{1} << shift_) - divisor_;
    factor_ = static_cast<uint32_t>((excess << 32) / divisor_ + 1);
  }

  // Leaves n's remainder in n.
  __device__ __forceinline__ uint32_t divide(uint32_t& n) const {
    const uint32_t quotient = (__umulhi(n, factor_) + n) >> shift_;
    n -= quotient * divisor_;
    return quotient;
  }

 private:
  uint32_t divisor_, factor_, shift_ = 0;
};

}  // namespace ssmcore::cuda
