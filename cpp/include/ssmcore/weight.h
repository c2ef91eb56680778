// Weight: one matrix of a model, in whatever format it is stored.
#pragma once

#include "ssmcore/tensor.h"

namespace ssmcore {

enum class WeightFormat : uint8_t {
  dense,  // `data` is (rows, cols), each row contiguous, of dtype float32, bfloat16 or float16
};

// A matrix of shape (rows, cols) = (output features, input features), as torch.nn.Linear keeps it.
struct Weight {
  TensorView data;
  WeightFormat format = WeightFormat::dense;
  TensorView scales;  // for quantised formats; empty for dense

  Weight() = default;
  Weight(const TensorView& dense) : data(dense) {}  // NOLINT: a dense view is a weight

  int64_t rows() const { return data.shape[0]; }
  int64_t cols() const { return data.shape[1]; }
};

}  // namespace ssmcore
