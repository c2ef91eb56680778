// Matrix products by cuBLASLt.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>

#include "cublaslt.h"
#include "matrix_product.h"
#include "ssmcore/context.h"

namespace ssmcore::cuda {

// cuBLASLt's handle for a device, and how it computes each product that came so far. Usable from
// several threads.
class LinearPlans {
 public:
  // Whether the operands are such as cuBLASLt knows.
  static bool takes(const MatrixProduct& p);
  // Bytes of workspace that run() uses.
  static size_t workspace_size(const MatrixProduct& p);

  LinearPlans();
  ~LinearPlans();
  LinearPlans(const LinearPlans&) = delete;
  LinearPlans& operator=(const LinearPlans&) = delete;

  // Of a product that it takes. Returns false, with nothing done, where cuBLASLt has no algorithm
  // for it. batch_invariant: the bits of a row of a do not depend on the number of rows.
  bool run(const MatrixProduct& p, bool batch_invariant, const Exec& exec);

 private:
  struct Plan;
  using Key = std::array<int64_t, 17>;

  Plan& plan(const MatrixProduct& p, bool batch_invariant);

  const CublasLt& lt_;
  CublasLt::Handle handle_ = nullptr;
  std::mutex mutex_;  // for all that follows
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace ssmcore::cuda
