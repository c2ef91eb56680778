// Random tensors on a GPU.
#pragma once

#include <initializer_list>

#include "ssmcore/context.h"
#include "ssmcore/tensor.h"

namespace ssmcore::bench {

// Uniform random numbers from `least` to below `most`; the memory lives as long as this.
class Random {
 public:
  // float32, bfloat16, int32 or int64. There when the constructor returns.
  Random(const Context& context, float least, float most, std::initializer_list<int64_t> shape,
         DType dtype);
  const TensorView& view() const { return view_; }

 private:
  Buffer memory_;
  TensorView view_;
};

}  // namespace ssmcore::bench
