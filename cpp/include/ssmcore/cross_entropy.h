// The loss of a language model: the cross entropy between its logits and the tokens that came.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/gradient.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// loss[i] = lse[i] - logits[i, targets[i]] with lse[i] = log Σ_v exp(logits[i, v]), in float32; 0
// where targets[i] is ignore_index. Rows are independent, so that many may be done a part at a
// time. Or everything is float64, for checking on the CPU.
struct CrossEntropyFwdArgs {
  TensorView logits;   // (rows, vocab_size): float32, bfloat16 or float16
  TensorView targets;  // (rows), int32 or int64, in [0, vocab_size) or ignore_index
  int64_t ignore_index = -100;

  TensorView loss;       // optional (rows), float32, written
  TensorView mean_loss;  // optional (1), float32, written: over the rows that are not ignored; NaN
                         // where all are
  TensorView lse;        // optional (rows), float32, written, also of ignored rows
};

size_t cross_entropy_fwd_workspace_size(const CrossEntropyFwdArgs& args, const Context& context);

void cross_entropy_fwd(const CrossEntropyFwdArgs& args, const Exec& exec);

// dlogits[i, v] = dloss[i] (exp(logits[i, v] - lse[i]) - [v = targets[i]]); 0 in ignored rows.
struct CrossEntropyBwdArgs {
  TensorView logits, targets;  // as the forward had them
  int64_t ignore_index = -100;
  TensorView lse;  // (rows), float32: the forward's

  // One of the two. Of a mean over rows that are done in parts, dloss is its gradient divided by
  // the number of rows that are not ignored, in all parts, with a stride of 0.
  TensorView dloss;       // (rows), float32
  TensorView dmean_loss;  // (1), float32

  Gradient dlogits;  // (rows, vocab_size), any activation type; may be logits' memory
};

size_t cross_entropy_bwd_workspace_size(const CrossEntropyBwdArgs& args, const Context& context);

void cross_entropy_bwd(const CrossEntropyBwdArgs& args, const Exec& exec);

}  // namespace ssmcore
