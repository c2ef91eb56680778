#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

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

size_t available_host_memory() {
  size_t available = SIZE_MAX;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);)
    if (line.rfind("MemAvailable:", 0) == 0)
      available = std::strtoull(line.c_str() + line.find(':') + 1, nullptr, 10) << 10;
  size_t limit;
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit) available = std::min(available, limit);
  return available;
}

}  // namespace ssmcore
