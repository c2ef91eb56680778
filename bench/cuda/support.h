// What the benchmarks share: shapes from their names, layouts, and the measuring.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <nvbench/nvbench.cuh>
#include <nvtx3/nvtx3.hpp>
#include <sstream>
#include <stdexcept>
#include <string>

#include "copy_rate.h"
#include "random.h"
#include "ssmcore/context.h"
#include "ssmcore/tensor.h"

namespace ssmcore::bench {

// The axis "shape" of a benchmark, such as "B8 D4096 L2048 N16 bf16": sizes by letter, and the
// activations' dtype.
class Shape {
 public:
  explicit Shape(const nvbench::state& state) : text_(state.get_string("shape")) {}

  int64_t operator[](char letter) const {
    for (std::istringstream words(text_); words;) {
      std::string word;
      words >> word;
      if (word[0] == letter) return std::atoll(word.c_str() + 1);
    }
    throw std::runtime_error("the shape '" + text_ + "' has no " + letter);
  }
  DType dtype() const {
    if (text_.find("bf16") != std::string::npos) return DType::bfloat16;
    if (text_.find("fp32") != std::string::npos) return DType::float32;
    throw std::runtime_error("the shape '" + text_ + "' has no dtype, bf16 or fp32");
  }

 private:
  std::string text_;
};

// The axis "layout" of sequences.
constexpr const char *kSeqlenContiguous = "L-contiguous", *kDimContiguous = "D-contiguous";

// A random (batch, rows, seqlen) in the memory order of the axis "layout".
class RandomSequence {
 public:
  RandomSequence(const nvbench::state& state, const Context& context, float least, float most,
                 int64_t batch, int64_t rows, int64_t seqlen, DType dtype)
      : dim_contiguous_(state.get_string("layout") == kDimContiguous),
        tensor_(dim_contiguous_ ? Random(context, least, most, {batch, seqlen, rows}, dtype)
                                : Random(context, least, most, {batch, rows, seqlen}, dtype)) {}
  TensorView view() const {
    return dim_contiguous_ ? tensor_.view().transpose(1, 2) : tensor_.view();
  }

 private:
  bool dim_contiguous_;
  Random tensor_;
};

inline Device device_of(const nvbench::state& state) {
  return {DeviceType::cuda, state.get_device()->get_id()};
}

// What an operator reads and writes at the least. A tensor that it updates is listed twice.
inline double bytes_of(std::initializer_list<TensorView> tensors) {
  double bytes = 0;
  for (const TensorView& tensor : tensors)
    bytes += static_cast<double>(tensor.numel()) * dtype_size(tensor.dtype);
  return bytes;
}

// The domain of the NVTX ranges.
struct NvtxDomain {
  static constexpr const char* name = "ssmcore";
};

// "selective_scan_fwd B8 D4096 L2048 N16 bf16 L-contiguous": the benchmark and its axes' values.
inline std::string range_name(const nvbench::state& state) {
  std::string name = state.get_benchmark().get_name();
  for (const std::string& axis : state.get_axis_values().get_names())
    name += " " + state.get_axis_values().get_string(axis);
  return name;
}

inline void add_column(nvbench::state& state, const char* name, double value) {
  nvbench::summary& summary = state.add_summary(std::string("ssmcore/") + name);
  summary.set_string("name", name);
  summary.set_float64("value", value);
}

// The median device time of what has been measured; 0 where nothing was, as under --profile.
inline double median_seconds(const nvbench::state& state) {
  if (state.is_skipped() || state.get_run_once()) return 0;
  return state.get_summary("nv/cold/time/gpu/median").get_float64("value");
}

// Calls an operator over and over, in a workspace of the size it asks for, and adds to NVBench's
// own columns what the median device time on a cold L2 makes of `elements` and `bytes`.
template <typename Args>
void measure(nvbench::state& state, const Context& context,
             size_t (*workspace_size)(const Args&, const Context&),
             void (*op)(const Args&, const Exec&), const Args& args, double elements,
             double bytes) {
  const Buffer workspace(context.allocator(), workspace_size(args, context), "a benchmark");
  const std::string name = range_name(state);
  state.exec(nvbench::exec_tag::gpu, [&](nvbench::launch& launch) {
    const nvtx3::scoped_range_in<NvtxDomain> range(name);
    op(args, Exec{context, launch.get_stream(), workspace.data(), workspace.bytes()});
  });
  const double seconds = median_seconds(state);
  if (seconds == 0) return;
  const double rate = copy_rate(device_of(state).index);
  add_column(state, "ms", seconds * 1e3);
  add_column(state, "ps/elem", seconds * 1e12 / elements);
  add_column(state, "GB/s", bytes / seconds * 1e-9);
  add_column(state, "copy GB/s", rate * 1e-9);
  add_column(state, "% of copy", bytes / seconds / rate * 100);
}

}  // namespace ssmcore::bench
