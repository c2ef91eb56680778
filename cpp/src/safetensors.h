// The safetensors format: 8 bytes of little-endian header length, a JSON header, the tensors' data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "ssmcore/tensor.h"

namespace ssmcore {

class NewFile;

inline constexpr std::pair<const char*, DType> kSafetensorsTypes[] = {
    {"F32", DType::float32}, {"F64", DType::float64}, {"BF16", DType::bfloat16},
    {"F16", DType::float16}, {"I32", DType::int32},   {"I64", DType::int64},
};

// Views of the tensors of a safetensors file that lies in memory. Throws Error(invalid_checkpoint),
// its message starting with `source`, unless the header is well formed, every tensor has a known
// dtype and a rank of at most kMaxRank, and the tensors fill the data without overlaps or holes.
std::map<std::string, TensorView> parse_safetensors(const uint8_t* data, size_t size,
                                                    const std::string& source);

using NamedTensor = std::pair<std::string, TensorView>;

// Tensors in memory of the host: larger elements first, so that every tensor is aligned, then by
// name. Throws Error(invalid_argument) that begins with `op` for a tensor that is not contiguous or
// of another dtype.
void write_safetensors(const char* op, std::vector<NamedTensor> tensors, NewFile& file);

}  // namespace ssmcore
