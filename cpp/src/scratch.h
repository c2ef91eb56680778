// Carving one block of memory into pieces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "ssmcore/context.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// Hands out consecutive pieces, each aligned to 64 bytes. Where only the sum is wanted, as in
// *_workspace_size, it starts from `nowhere()`, and its pieces are not touched.
class Scratch {
 public:
  explicit Scratch(void* memory) : begin_(static_cast<char*>(memory)), next_(begin_) {}
  static Scratch nowhere() { return Scratch(reinterpret_cast<void*>(kAlignment)); }

  __attribute__((always_inline)) void* bytes(size_t count) {
    char* piece = next_;
    next_ += (count + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  __attribute__((always_inline)) float* floats(int64_t count) {
    return static_cast<float*>(bytes(static_cast<size_t>(count) * sizeof(float)));
  }
  TensorView tensor(DType dtype, std::initializer_list<int64_t> shape, Device device) {
    TensorView view(nullptr, dtype, shape, device);
    view.data = bytes(static_cast<size_t>(view.numel()) * dtype_size(dtype));
    return view;
  }

  size_t used() const { return static_cast<size_t>(next_ - begin_); }

  // What is left of the workspace of `exec`, from which this was carved.
  Exec rest(const Exec& exec) const {
    return Exec{exec.context, exec.stream, next_, exec.workspace_bytes - used()};
  }

 private:
  static constexpr size_t kAlignment = 64;
  char *begin_, *next_;
};

// The workers that this many bytes have room for: the pool may have grown since its size was asked.
__attribute__((always_inline)) inline int workers_with_scratch(size_t bytes,
                                                               size_t bytes_per_worker,
                                                               const Context& context) {
  const size_t room = bytes / bytes_per_worker;
  const size_t threads = static_cast<size_t>(context.num_threads());
  return static_cast<int>(room < threads ? room : threads);
}

__attribute__((always_inline)) inline int workers_with_scratch(const Exec& exec,
                                                               size_t bytes_per_worker) {
  return workers_with_scratch(exec.workspace_bytes, bytes_per_worker, exec.context);
}

}  // namespace ssmcore
