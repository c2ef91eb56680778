// Philox4x32-10, as cpp/src/philox.h has it for the CPU (Salmon et al., SC 2011).
#pragma once

#include <cstdint>

namespace ssmcore::cuda {

// The number in [0, 1), a multiple of 2^-53, that `seed` gives at `position`.
__device__ inline double philox_uniform(uint64_t seed, uint64_t position) {
  uint4 counter{static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter.x;
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter.z;
    counter = {
        static_cast<uint32_t>(product1 >> 32) ^ counter.y ^ key0, static_cast<uint32_t>(product1),
        static_cast<uint32_t>(product0 >> 32) ^ counter.w ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  const uint64_t bits = uint64_t{counter.y} << 32 | counter.x;
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace ssmcore::cuda
