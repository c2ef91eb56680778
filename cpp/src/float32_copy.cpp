// float32_copy: what training starts from.
#include <memory>

#include "scratch.h"
#include "ssmcore/buffer.h"
#include "ssmcore/error.h"
#include "weight_loader.h"

namespace ssmcore {

Checkpoint float32_copy(const Checkpoint& checkpoint) {
  Checkpoint copy{checkpoint.config, {}};
  // Placed nowhere first, for the size, then in the memory.
  const auto place = [&](Scratch scratch) {
    for (const auto& [name, stored] : checkpoint.tensors.tensors) {
      if (stored.dtype != DType::float32 && stored.dtype != DType::bfloat16 &&
          stored.dtype != DType::float16)
        throw Error(ErrorCode::invalid_checkpoint, "checkpoint: tensor " + name + " has dtype " +
                                                       dtype_name(stored.dtype) +
                                                       ", expected float32, bfloat16 or float16");
      if (stored.device.type != DeviceType::cpu)
        throw Error(ErrorCode::invalid_checkpoint, "checkpoint: tensor " + name + " is on " +
                                                       to_string(stored.device) + ", expected cpu");
      if (!stored.is_contiguous())
        throw Error(ErrorCode::invalid_checkpoint,
                    "checkpoint: tensor " + name + " is not contiguous");
      TensorView& view = copy.tensors.tensors[name] = stored;
      view.data = scratch.floats(stored.numel());
      view.dtype = DType::float32;
    }
    return scratch.used();
  };
  const auto memory =
      std::make_shared<Buffer>(cpu_allocator(), place(Scratch::nowhere()), "a copy of the weights");
  place(Scratch(memory->data()));
  for (const auto& [name, stored] : checkpoint.tensors.tensors)
    to_float32(stored.as<const char>(), stored.dtype, stored.numel(),
               copy.tensors.tensors[name].as<float>());
  copy.tensors.owner = memory;
  return copy;
}

}  // namespace ssmcore
