#include "memory.h"

#include <cstring>

#include "cuda_backend.h"

namespace ssmcore {

void copy_bytes(const Context& context, void* to, const void* from, size_t bytes, void* stream) {
  if (bytes == 0) return;
  if (context.device().type == DeviceType::cuda)
    cuda::copy_bytes(context.cuda(), to, from, bytes, stream);
  else
    std::memcpy(to, from, bytes);
}

void zero_bytes(const Context& context, void* to, size_t bytes, void* stream) {
  if (bytes == 0) return;
  if (context.device().type == DeviceType::cuda)
    cuda::zero_bytes(context.cuda(), to, bytes, stream);
  else
    std::memset(to, 0, bytes);
}

}  // namespace ssmcore
