// Device memory: one stream-ordered pool a device, which keeps what is freed.
#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "device_state.h"
#include "launch.h"

namespace ssmcore::cuda {
namespace {

class PoolAllocator final : public Allocator {
 public:
  explicit PoolAllocator(int index) : index_(index) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = index;
    check(cudaMemPoolCreate(&pool_, &properties), "allocator");
    uint64_t keep = UINT64_MAX;
    check(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keep), "allocator");
  }

  Device device() const override { return {DeviceType::cuda, index_}; }

  void* allocate(size_t bytes, void* stream) override {
    const DeviceGuard guard(index_);
    void* data = nullptr;
    cudaError_t status =
        cudaMallocFromPoolAsync(&data, bytes, pool_, static_cast<cudaStream_t>(stream));
    if (status == cudaErrorMemoryAllocation) {
      // What is kept in pieces may do as a whole.
      cudaGetLastError();
      release_unused();
      status = cudaMallocFromPoolAsync(&data, bytes, pool_, static_cast<cudaStream_t>(stream));
    }
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    check(status, "allocator");
    return data;
  }

  void deallocate(void* data, size_t, void* stream) noexcept override {
    cudaFreeAsync(data, static_cast<cudaStream_t>(stream));
  }

  void release_unused() noexcept override {
    int before = index_;
    cudaGetDevice(&before);
    cudaSetDevice(index_);
    cudaDeviceSynchronize();  // what is freed in the order of a stream is so only now
    cudaMemPoolTrimTo(pool_, 0);
    cudaGetLastError();  // an error of the device is the next call's to find
    cudaSetDevice(before);
  }

 private:
  int index_;
  cudaMemPool_t pool_;
};

}  // namespace

Allocator& default_allocator(int index) {
  // Never destroyed: buffers may outlive whatever else the program tears down.
  static std::mutex& mutex = *new std::mutex;
  static auto& allocators = *new std::vector<std::unique_ptr<PoolAllocator>>;
  const std::lock_guard<std::mutex> lock(mutex);
  require_device(index, device_count());
  if (allocators.size() <= static_cast<size_t>(index)) allocators.resize(index + 1);
  auto& allocator = allocators[static_cast<size_t>(index)];
  if (!allocator) {
    const DeviceGuard guard(index);
    allocator = std::make_unique<PoolAllocator>(index);
  }
  return *allocator;
}

}  // namespace ssmcore::cuda
