// The safetensors format: 8 bytes of little-endian header length, a JSON header, the tensors' data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "ssmcore/tensor.h"

namespace ssmcore {

// Views of the tensors of a safetensors file that lies in memory. Throws Error(invalid_checkpoint),
// its message starting with `source`, unless the header is well formed, every tensor has a known
// dtype and a rank of at most kMaxRank, and the tensors fill the data without overlaps or holes.
std::map<std::string, TensorView> parse_safetensors(const uint8_t* data, size_t size,
                                                    const std::string& source);

}  // namespace ssmcore
