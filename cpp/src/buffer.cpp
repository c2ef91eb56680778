#include "ssmcore/buffer.h"

#include <cstdlib>
#include <utility>

#include "cuda_backend.h"
#include "ssmcore/error.h"

namespace ssmcore {
namespace {

constexpr size_t kAlignment = 64;

class CpuAllocator final : public Allocator {
 public:
  Device device() const override { return {}; }
  void* allocate(size_t bytes, void*) override {
    if (bytes > SIZE_MAX - kAlignment) return nullptr;
    return std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  }
  void deallocate(void* data, size_t, void*) noexcept override { std::free(data); }
};

}  // namespace

Allocator& cpu_allocator() {
  static CpuAllocator allocator;
  return allocator;
}

Allocator& cuda_allocator(int index) {
  return cuda::default_allocator(index);
}

Buffer::Buffer(Allocator& allocator, size_t bytes, const char* purpose, void* stream)
    : allocator_(&allocator), bytes_(bytes), stream_(stream) {
  if (bytes == 0) return;
  data_ = allocator.allocate(bytes, stream);
  if (!data_)
    throw Error(ErrorCode::out_of_memory, "out of memory on " + to_string(allocator.device()) +
                                              ": " + std::to_string(bytes) + " bytes for " +
                                              purpose);
}

Buffer::Buffer(Buffer&& other) noexcept {
  *this = std::move(other);
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(allocator_, other.allocator_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(stream_, other.stream_);
  return *this;
}

Buffer::~Buffer() {
  if (data_) allocator_->deallocate(data_, bytes_, stream_);
}

TensorView Buffer::view(DType dtype, std::initializer_list<int64_t> shape) const {
  return TensorView(data_, dtype, shape, allocator_ ? allocator_->device() : Device{});
}

}  // namespace ssmcore
