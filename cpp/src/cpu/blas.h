// The dense matrix product of OpenBLAS.
#pragma once

#include <cstdint>

namespace ssmcore::cpu {

// c = a bᵀ for row-major a (m, k), b (n, k) and c (m, n), on the calling thread alone: the callers
// split the work themselves. Sizes and row strides must fit in int32.
void sgemm_nt(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
              int64_t ldb, float* c, int64_t ldc);

}  // namespace ssmcore::cpu
