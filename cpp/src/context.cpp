#include "ssmcore/context.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda_backend.h"
#include "ssmcore/error.h"
#include "thread_pool.h"

namespace ssmcore {
namespace {

constexpr int kMaxThreads = 1024;

int checked_threads(long n, const char* what) {
  if (n < 1 || n > kMaxThreads)
    throw Error(ErrorCode::invalid_argument, std::string(what) + " is " + std::to_string(n) +
                                                 ", expected 1 to " + std::to_string(kMaxThreads));
  return static_cast<int>(n);
}

int default_threads() {
  const char* text = std::getenv("SSMCORE_NUM_THREADS");
  if (!text || !*text) return available_cores();
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  if (*end)
    throw Error(ErrorCode::invalid_argument,
                std::string("SSMCORE_NUM_THREADS is '") + text + "', expected a number");
  return checked_threads(n, "SSMCORE_NUM_THREADS");
}

Isa chosen_isa() {
  const Isa best = detect_isa();
  const char* name = std::getenv("SSMCORE_ISA");
  if (!name || !*name) return best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    if (std::strcmp(name, isa_name(isa)) != 0) continue;
    if (isa > best)
      throw Error(ErrorCode::unsupported, std::string("SSMCORE_ISA is ") + name +
                                              ", this machine or build has up to " +
                                              isa_name(best));
    return isa;
  }
  throw Error(ErrorCode::invalid_argument, std::string("SSMCORE_ISA is '") + name +
                                               "', expected baseline, avx2, avx512 or avx512_bf16");
}

}  // namespace

Context::Context(Device device, const ContextOptions& options)
    : device_(device),
      isa_(chosen_isa()),
      allocator_(options.allocator),
      batch_invariant_(options.batch_invariant) {
  if (device.type == DeviceType::cuda) cuda_ = cuda::make_device_state(device.index);
  if (!allocator_) allocator_ = cuda_ ? &cuda_allocator(device.index) : &cpu_allocator();
  if (allocator_->device() != device)
    throw Error(ErrorCode::invalid_argument, "context: the allocator is of " +
                                                 to_string(allocator_->device()) + ", expected " +
                                                 to_string(device));
  const int threads = options.num_threads != 0
                          ? checked_threads(options.num_threads, "context: num_threads")
                          : default_threads();
  thread_pool_ = std::make_unique<ThreadPool>(threads);
}

Context::~Context() = default;

int Context::num_threads() const {
  return thread_pool_->num_threads();
}

void Context::set_num_threads(int n) {
  thread_pool_->set_num_threads(checked_threads(n, "set_num_threads: n"));
}

void Context::synchronize(void* stream) const {
  if (cuda_) cuda::synchronize(*cuda_, stream);
}

DeviceMemory device_memory(const Context& context) {
  if (context.device().type == DeviceType::cpu)
    throw Error(ErrorCode::unsupported, "device_memory: the device is cpu, expected a GPU");
  DeviceMemory memory;
  cuda::device_memory(context.cuda(), &memory.free, &memory.total);
  return memory;
}

void set_cublaslt_path(const std::string& path) {
  cuda::set_cublaslt_path(path.c_str());
}

int cuda_device_count() {
  return cuda::device_count();
}

}  // namespace ssmcore
