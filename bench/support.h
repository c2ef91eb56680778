// What the benchmarks share: random tensors, threads to measure with, and the measuring loop.
#pragma once

#include <benchmark/benchmark.h>

#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "ssmcore/context.h"
#include "ssmcore/tensor.h"

namespace ssmcore::bench {

// Random numbers, viewed as a tensor of float32 or, cut off, of bfloat16; the memory lives as long
// as this.
class Random {
 public:
  Random(float least, float most, std::initializer_list<int64_t> shape,
         DType dtype = DType::float32)
      : view_(nullptr, dtype, shape), memory_(view_.numel() * dtype_size(dtype)) {
    static std::mt19937 generator(1);
    std::uniform_real_distribution<float> distribution(least, most);
    const size_t size = dtype_size(dtype);
    for (size_t i = 0; i < memory_.size(); i += size) {
      const float value = distribution(generator);
      // bfloat16 is the upper half of float32.
      std::memcpy(&memory_[i], reinterpret_cast<const char*>(&value) + sizeof(float) - size, size);
    }
    view_.data = memory_.data();
  }
  const TensorView& view() const { return view_; }

 private:
  TensorView view_;
  std::vector<char> memory_;
};

enum Layout : int64_t { kSeqlenContiguous, kDimContiguous };

inline const char* layout_name(Layout layout) {
  return layout == kSeqlenContiguous ? "L contiguous" : "D contiguous";
}

// A random (batch, rows, seqlen) in the memory order of the layout.
class RandomSequence {
 public:
  RandomSequence(Layout layout, float least, float most, int64_t batch, int64_t rows,
                 int64_t seqlen)
      : layout_(layout),
        tensor_(layout == kSeqlenContiguous ? Random(least, most, {batch, rows, seqlen})
                                            : Random(least, most, {batch, seqlen, rows})) {}
  TensorView view() const {
    return layout_ == kSeqlenContiguous ? tensor_.view() : tensor_.view().transpose(1, 2);
  }

 private:
  Layout layout_;
  Random tensor_;
};

// One thread, and every core.
inline std::set<int> thread_counts() {
  return {1, Context().num_threads()};
}

inline ContextOptions with_threads(int64_t threads) {
  ContextOptions options;
  options.num_threads = static_cast<int>(threads);
  return options;
}

// Runs an operator over and over, in a workspace of the size it asks for.
template <typename Args>
void measure(benchmark::State& state, int64_t threads,
             size_t (*workspace_size)(const Args&, const Context&),
             void (*op)(const Args&, const Exec&), const Args& args) {
  const Context context({}, with_threads(threads));
  const Buffer workspace(context.allocator(), workspace_size(args, context), "a benchmark");
  const Exec exec{context, nullptr, workspace.data(), workspace.bytes()};
  for ([[maybe_unused]] auto _ : state) {
    op(args, exec);
    benchmark::ClobberMemory();
  }
}

}  // namespace ssmcore::bench
