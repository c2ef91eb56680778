// Owning memory: Allocator (replaceable by the embedder's own) and Buffer.
#pragma once

#include <cstddef>
#include <initializer_list>

#include "ssmcore/tensor.h"

namespace ssmcore {

// Gives out memory on one device. Implementations are thread-safe.
class Allocator {
 public:
  virtual ~Allocator() = default;
  virtual Device device() const = 0;
  // At least 64-byte aligned memory, or nullptr when there is none. `stream` is the device stream
  // on which the memory will first be used; the CPU ignores it.
  virtual void* allocate(size_t bytes, void* stream) = 0;
  virtual void deallocate(void* data, size_t bytes, void* stream) noexcept = 0;
  // Waits for the device, where calls do not, and gives back to it what is kept for later.
  virtual void release_unused() noexcept {}
};

// The default allocator for host memory; lives as long as the program.
Allocator& cpu_allocator();

// The default allocator of a GPU: a pool of its own, ordered by streams, that keeps what is freed
// for the next one. Lives as long as the program. Throws Error(unsupported) for a device that is
// not there.
Allocator& cuda_allocator(int index);

// A block of memory that frees itself. Views of it are valid as long as it lives; its allocator
// must outlive it.
class Buffer {
 public:
  Buffer() = default;
  // Throws Error(out_of_memory) naming `purpose` and the size when the allocator has none left.
  // The memory is not initialised.
  Buffer(Allocator& allocator, size_t bytes, const char* purpose, void* stream = nullptr);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  explicit operator bool() const { return data_ != nullptr; }
  // A contiguous view of the start of the buffer.
  TensorView view(DType dtype, std::initializer_list<int64_t> shape) const;

 private:
  Allocator* allocator_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
  void* stream_ = nullptr;
};

}  // namespace ssmcore
