// Stands in for cuda/ in a build without it.
#include "cuda_backend.h"
#include "kernels.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {
namespace {

[[noreturn]] void fail() {
  throw Error(ErrorCode::unsupported, "device cuda: ssmcore was built without CUDA");
}

}  // namespace

const KernelTable& kernel_table() {
  fail();
}

std::shared_ptr<DeviceState> make_device_state(int) {
  fail();
}

int device_count() {
  return 0;
}

Allocator& default_allocator(int) {
  fail();
}

void set_cublaslt_path(const char*) {
  fail();
}

void synchronize(DeviceState&, void*) {
  fail();
}

void* make_stream(DeviceState&) {
  fail();
}

void destroy_stream(DeviceState&, void*) noexcept {}

void wait_for(DeviceState&, void*, void*) {
  fail();
}

void copy_bytes(DeviceState&, void*, const void*, size_t, void*) {
  fail();
}

}  // namespace ssmcore::cuda
