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

// Workers that a loop of so many multiply-adds is worth waking: each wake-up costs
// about what a worker does in a microsecond or two.
__attribute__((always_inline)) inline int useful_workers(int64_t multiply_adds,
                                                         const Context& context) {
  constexpr int64_t kPerWorker = 1 << 17;
  const int64_t workers = 1 + multiply_adds / kPerWorker;
  const int threads = context.num_threads();
  return workers < threads ? static_cast<int>(workers) : threads;
}

// The same, but no more than the workspace has room for: the pool may have grown since its size was
// asked.
__attribute__((always_inline)) inline int workers_with_scratch(const Exec& exec,
                                                               size_t bytes_per_worker,
                                                               int64_t multiply_adds) {
  const size_t room = exec.workspace_bytes / bytes_per_worker;
  const size_t useful = static_cast<size_t>(useful_workers(multiply_adds, exec.context));
  return static_cast<int>(room < useful ? room : useful);
}

}  // namespace ssmcore
