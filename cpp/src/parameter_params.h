// What the kernels between a trainable model's parameters and the weights made of them are given.
#pragma once

#include <cmath>

#include "strided.h"

namespace ssmcore {

enum class ParameterMap { identity, negative_exp };  // A = -exp(A_log)

// to = map(from)
struct ParameterCopyParams {
  int64_t rows, cols;
  ParameterMap map;
  Strided<2> from;  // (rows, cols), float32
  DType to_dtype;   // of the activations
  Strided<2> to;    // (rows, cols)
};

// to = a b, element by element, or to += a b; all (rows, cols), float32 or float64.
struct ParameterProductParams {
  DType dtype;
  int64_t rows, cols;
  Strided<2> a, b;
  StridedGradient<2> to;
};

inline float apply(ParameterMap map, float value) {
  return map == ParameterMap::negative_exp ? -std::exp(value) : value;
}

}  // namespace ssmcore
