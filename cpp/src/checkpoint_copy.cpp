// Copies of checkpoints: what training starts from, and what it leaves.
#include <memory>
#include <vector>

#include "cuda_backend.h"
#include "memory.h"
#include "scratch.h"
#include "ssmcore/buffer.h"
#include "ssmcore/error.h"
#include "weight_loader.h"

namespace ssmcore {

Checkpoint float32_copy(const Checkpoint& checkpoint, const Context& context) {
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
      view.device = context.device();
    }
    return scratch.used();
  };
  const auto memory = std::make_shared<Buffer>(context.allocator(), place(Scratch::nowhere()),
                                               "a copy of the weights");
  place(Scratch(memory->data()));
  for (const auto& [name, stored] : checkpoint.tensors.tensors) {
    float* to = copy.tensors.tensors[name].as<float>();
    if (context.device().type == DeviceType::cpu) {
      to_float32(stored.as<const char>(), stored.dtype, stored.numel(), to);
      continue;
    }
    std::vector<float> host(static_cast<size_t>(stored.numel()));
    to_float32(stored.as<const char>(), stored.dtype, stored.numel(), host.data());
    copy_bytes(context, to, host.data(), sizeof(float) * host.size(), nullptr);
  }
  copy.tensors.owner = memory;
  return copy;
}

Checkpoint host_copy(const Checkpoint& checkpoint, const Context& context) {
  // Whatever stream the weights were written on.
  if (context.device().type == DeviceType::cuda) cuda::synchronize_device(context.cuda());
  Checkpoint copy = checkpoint;
  const auto place = [&](Scratch scratch) {
    for (auto& [name, tensor] : copy.tensors.tensors) {
      tensor.data = scratch.bytes(tensor.nbytes());
      tensor.device = {};
    }
    return scratch.used();
  };
  const auto memory =
      std::make_shared<Buffer>(cpu_allocator(), place(Scratch::nowhere()), "a copy of the weights");
  place(Scratch(memory->data()));
  for (const auto& [name, tensor] : checkpoint.tensors.tensors)
    copy_bytes(context, copy.tensors.tensors[name].data, tensor.data, tensor.nbytes(), nullptr);
  copy.tensors.owner = memory;
  return copy;
}

}  // namespace ssmcore
