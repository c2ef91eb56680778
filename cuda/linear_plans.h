// Matrix products by cuBLASLt.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>

#include "../cpp/src/linear_params.h"
#include "cublaslt.h"
#include "ssmcore/context.h"

namespace ssmcore::cuda {

// cuBLASLt's handle for a device, and how it computes each product that came so far. Usable from
// several threads.
class LinearPlans {
 public:
  // Bytes of workspace that run() uses.
  static size_t workspace_size(const LinearParams& p);

  LinearPlans();
  ~LinearPlans();
  LinearPlans(const LinearPlans&) = delete;
  LinearPlans& operator=(const LinearPlans&) = delete;

  // Returns false, with nothing done, for types, layouts and alignments that cuBLASLt cannot do.
  // On a batch-invariant context the bits of a row do not depend on the number of rows.
  bool run(const LinearParams& p, const Exec& exec);

 private:
  struct Plan;
  using Key = std::array<int64_t, 12>;

  Plan& plan(const LinearParams& p, bool batch_invariant);

  const CublasLt& lt_;
  CublasLt::Handle handle_ = nullptr;
  std::mutex mutex_;  // for all that follows
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace ssmcore::cuda
