// Sums over the rows of a matrix.
#pragma once

#include "../cpp/src/strided.h"
#include "ssmcore/context.h"

namespace ssmcore::cuda {

size_t column_sums_workspace_size(int64_t rows, int64_t cols);

// out[c] = Σ_r matrix[r, c], in float32 and in an order that the shape alone decides. Its workspace
// is that of `exec`.
void launch_column_sums(const char* op, const Strided<2>& matrix, DType dtype, int64_t rows,
                        int64_t cols, const StridedGradient<1>& out, const Exec& exec);

}  // namespace ssmcore::cuda
