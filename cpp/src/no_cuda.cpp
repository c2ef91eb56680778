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

void device_memory(DeviceState&, size_t*, size_t*) {
  fail();
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

void synchronize_device(DeviceState&) {
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

void zero_bytes(DeviceState&, void*, size_t, void*) {
  fail();
}

std::shared_ptr<void> make_host_memory(DeviceState&, size_t) {
  fail();
}

std::shared_ptr<void> make_event(DeviceState&) {
  fail();
}

void record_event(DeviceState&, void*, void*) {
  fail();
}

void wait_for_event(DeviceState&, void*) {
  fail();
}

std::shared_ptr<void> capture(DeviceState&, const char*, const std::function<void(void*)>&) {
  fail();
}

void launch_graph(DeviceState&, void*, void*) {
  fail();
}

}  // namespace ssmcore::cuda
