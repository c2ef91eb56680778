// The kernels of linear that are our own: for few rows, and for what cuBLASLt does not do.
#pragma once

#include "../cpp/src/linear_params.h"
#include "device/types.cuh"
#include "ssmcore/context.h"

namespace ssmcore::cuda {

// Reads the weight once for every 8 rows, or 16 where tensor cores multiply, at the rate of memory.
// Returns false, with nothing done, for operands that cannot be read 16 bytes at a time.
bool launch_linear_few_rows(const LinearParams& p, const Exec& exec);

// Any types, strides and alignments. A row's bits do not depend on the number of rows.
void launch_linear_tiled(const LinearParams& p, const Exec& exec);

__device__ __forceinline__ float load_as_float(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::bfloat16:
      return to_float(static_cast<const bfloat16*>(data)[at]);
    case DType::float16:
      return to_float(static_cast<const float16*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

// Adds the bias to a sum, and stores it.
__device__ __noinline__ inline void store_output(const LinearParams& p, int64_t row, int64_t output,
                                                 float sum) {
  if (p.bias.data) sum += load_as_float(p.bias.data, p.bias_dtype, output * p.bias.stride[0]);
  const int64_t at = row * p.out.stride[0] + output * p.out.stride[1];
  switch (p.out_dtype) {
    case DType::bfloat16:
      static_cast<bfloat16*>(p.out.data)[at] = from_float<bfloat16>(sum);
      break;
    case DType::float16:
      static_cast<float16*>(p.out.data)[at] = from_float<float16>(sum);
      break;
    default:
      static_cast<float*>(p.out.data)[at] = sum;
  }
}

}  // namespace ssmcore::cuda
