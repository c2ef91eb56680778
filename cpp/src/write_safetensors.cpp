#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <tuple>

#include "new_file.h"
#include "safetensors.h"
#include "ssmcore/error.h"

namespace ssmcore {
namespace {

using nlohmann::json;

const char* name_of(DType dtype) {
  for (const auto& [name, known] : kSafetensorsTypes)
    if (known == dtype) return name;
  return nullptr;
}

}  // namespace

void write_safetensors(const char* op, std::vector<NamedTensor> tensors, NewFile& file) {
  std::sort(tensors.begin(), tensors.end(), [](const NamedTensor& a, const NamedTensor& b) {
    return std::make_tuple(-static_cast<int>(dtype_size(a.second.dtype)), std::cref(a.first)) <
           std::make_tuple(-static_cast<int>(dtype_size(b.second.dtype)), std::cref(b.first));
  });
  json header = {{"__metadata__", {{"format", "pt"}}}};
  size_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    const char* dtype = name_of(tensor.dtype);
    if (!dtype || !tensor.is_contiguous())
      throw Error(ErrorCode::invalid_argument,
                  std::string(op) + ": tensor " + name +
                      (dtype ? " is not contiguous"
                             : std::string(" has dtype ") + dtype_name(tensor.dtype) +
                                   ", which safetensors does not store"));
    const size_t end = offset + tensor.nbytes();
    header[name] = {
        {"dtype", dtype},
        {"shape", std::vector<int64_t>(tensor.shape, tensor.shape + tensor.rank)},
        {"data_offsets", {offset, end}},
    };
    offset = end;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  std::string length;
  for (int i = 0; i < 8; ++i) length += static_cast<char>(uint64_t{text.size()} >> (8 * i));
  file.write(length + text);
  for (const auto& [name, tensor] : tensors) file.write(tensor.data, tensor.nbytes());
}

}  // namespace ssmcore
