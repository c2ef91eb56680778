// The largest of many floats.
#pragma once

#include <cstdint>

namespace ssmcore {

// Of n > 0 floats, none of them NaN. In lanes, which a compiler turns into vectors.
inline float largest_of(const float* values, int64_t n) {
  constexpr int kLanes = 16;
  float lanes[kLanes];
  for (float& lane : lanes) lane = values[0];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane)
      lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
  float largest = lanes[0];
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  for (; i < n; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}

}  // namespace ssmcore
