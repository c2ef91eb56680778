// Carving one block of memory into pieces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "ssmcore/context.h"
#include "ssmcore/tensor.h"
#include "thread_pool.h"

namespace ssmcore {

// Hands out consecutive pieces, each aligned to 64 bytes. Where only the sum is wanted, as in
// *_workspace_size, it starts from `nowhere()`, and its pieces are not touched.
class Scratch {
 public:
  explicit Scratch(void* memory) : begin_(static_cast<char*>(memory)) {}
  static Scratch nowhere() { return Scratch(reinterpret_cast<void*>(kAlignment)); }

  __attribute__((always_inline)) void* bytes(size_t count) {
    char* piece = begin_ + used_;
    // Sizes beyond any memory stay so, instead of wrapping around to small ones.
    if (count > kTooMuch - used_)
      used_ = kTooMuch;
    else
      used_ += (count + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  __attribute__((always_inline)) float* floats(int64_t count) {
    return static_cast<float*>(bytes(product(static_cast<size_t>(count), sizeof(float))));
  }
  // An array of floats of these sizes.
  __attribute__((always_inline)) float* floats(std::initializer_list<int64_t> shape) {
    size_t count = sizeof(float);
    for (const int64_t size : shape) count = product(count, static_cast<size_t>(size));
    return static_cast<float*>(bytes(count));
  }
  TensorView tensor(DType dtype, std::initializer_list<int64_t> shape, Device device) {
    size_t count = dtype_size(dtype);
    for (const int64_t size : shape) count = product(count, static_cast<size_t>(size));
    void* piece = bytes(count);
    return used_ == kTooMuch ? TensorView() : TensorView(piece, dtype, shape, device);
  }

  size_t used() const { return used_; }

  // Of sizes in bytes or elements; what is too much stays too much.
  __attribute__((always_inline)) static size_t product(size_t a, size_t b) {
    size_t result;
    return __builtin_mul_overflow(a, b, &result) || result > kTooMuch ? kTooMuch : result;
  }

  // What is left of the workspace of `exec`, from which this was carved.
  Exec rest(const Exec& exec) const {
    return Exec{exec.context, exec.stream, begin_ + used_, exec.workspace_bytes - used_};
  }

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kTooMuch = SIZE_MAX / 2 / kAlignment * kAlignment;
  char* begin_;
  size_t used_ = 0;
};

// Workers that a loop of so many multiply-adds is worth. One that looks for work joins in a
// microsecond or two; to wake those that sleep takes tens.
__attribute__((always_inline)) inline int useful_workers(int64_t multiply_adds,
                                                         const Context& context) {
  constexpr int64_t kPerWorker = 1 << 17, kToWake = 1 << 21;
  if (multiply_adds < kToWake && context.thread_pool().is_asleep()) return 1;
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
