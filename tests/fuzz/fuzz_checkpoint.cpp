// A libFuzzer target for the readers of safetensors headers and configurations: any input must end
// in a result or an Error, and every view must lie within the input. Build with
// -fsanitize=fuzzer,address,undefined.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "safetensors.h"
#include "ssmcore/error.h"
#include "ssmcore/model_config.h"

using namespace ssmcore;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    for (const auto& [name, view] : parse_safetensors(data, size, "fuzz")) {
      const auto* begin = view.as<const uint8_t>();
      const size_t bytes = static_cast<size_t>(view.numel()) * dtype_size(view.dtype);
      if (begin < data || bytes > size || begin > data + size - bytes) std::abort();
    }
  } catch (const Error&) {
  }
  try {
    const ModelConfig config =
        parse_model_config(std::string(reinterpret_cast<const char*>(data), size));
    if (config.d_model < 1 || config.dim < 1 || config.padded_vocab_size < config.vocab_size) {
      std::abort();
    }
  } catch (const Error&) {
  }
  return 0;
}
