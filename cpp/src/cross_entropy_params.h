// What the cross entropy's kernels are given, already checked. See ssmcore/cross_entropy.h.
#pragma once

#include "strided.h"

namespace ssmcore {

struct CrossEntropyFwdParams {
  DType dtype,
      index_dtype;  // of logits and targets; the rest is float32, or float64 where these are
  int64_t rows, vocab_size, ignore_index;

  Strided<2> logits;     // (rows, vocab_size)
  Strided<1> targets;    // (rows)
  Strided<1> loss, lse;  // (rows)
  Strided<1> mean_loss;  // (1)
};

struct CrossEntropyBwdParams {
  CrossEntropyFwdParams fwd;  // the inputs and lse; loss and mean_loss are null

  Strided<1> dloss;            // (rows); or
  Strided<1> dmean_loss;       // (1)
  StridedGradient<2> dlogits;  // (rows, vocab_size)
};

}  // namespace ssmcore
