// The kernels of linear and its gradients that are our own: for few rows, and for what cuBLASLt
// does not do.
#pragma once

#include "matrix_product.h"
#include "ssmcore/context.h"

namespace ssmcore::cuda {

// Reads the weight once for every 8 rows, or 16 where tensor cores multiply, at the rate of memory.
// Returns false, with nothing done, for operands that cannot be read 16 bytes at a time.
bool launch_linear_few_rows(const LinearParams& p, const Exec& exec);

// Any types, strides and alignments. A row's bits do not depend on the number of rows.
void launch_linear_tiled(const MatrixProduct& product, const Exec& exec);

// By cuBLASLt, in a workspace of the size that LinearPlans asks for, or by the tiled kernel.
// batch_invariant: the bits of a row of a do not depend on the number of rows.
void multiply(const MatrixProduct& product, bool batch_invariant, const Exec& exec);

}  // namespace ssmcore::cuda
