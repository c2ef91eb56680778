#include "blas.h"

#include <cblas.h>

#if defined(SSMCORE_PREFIXED_OPENBLAS)  // the scipy-openblas32 wheel's
#define cblas_sgemm scipy_cblas_sgemm
#define openblas_set_num_threads scipy_openblas_set_num_threads
#endif

namespace ssmcore::cpu {

void sgemm_nt(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
              int64_t ldb, float* c, int64_t ldc) {
  // OpenBLAS keeps one thread count for the whole process. Built from the scipy-openblas32 wheel
  // this is a copy of our own, so nobody else is affected.
  [[maybe_unused]] static const bool single_threaded = (openblas_set_num_threads(1), true);
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<blasint>(m),
              static_cast<blasint>(n), static_cast<blasint>(k), 1.0f, a, static_cast<blasint>(lda),
              b, static_cast<blasint>(ldb), 0.0f, c, static_cast<blasint>(ldc));
}

}  // namespace ssmcore::cpu
