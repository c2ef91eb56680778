// Choosing the next token from logits.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

// Row by row: repetition penalty, temperature, top-k, top-p, min-p, then one draw. Each setting is
// a (batch) tensor, absent for its default; stride 0 gives every row the same. A temperature of 0
// takes the largest logit, the lowest id among equals.
//
// The draw is Philox4x32-10 (Salmon et al., SC 2011) with key = seed and counter = position, so a
// row's tokens do not depend on its batch.
struct SampleArgs {
  TensorView logits;   // (batch, vocab_size), float32
  TensorView history;  // optional (batch, length), int32 or int64: ids the penalty applies to;
                       // negative entries are padding

  TensorView repetition_penalty;  // float32, > 0, default 1: logits of ids in `history` are divided
                                  // by it where positive and multiplied where negative
  TensorView temperature;         // float32, ≥ 0, default 1
  TensorView top_k;               // int32, default 0 (off): keep the k largest
  TensorView top_p;               // float32 in (0, 1], default 1 (off): keep the smallest set of
                                  // largest probabilities that sums to at least p
  TensorView min_p;               // float32 in [0, 1], default 0 (off): keep probabilities of at
                                  // least min_p times the largest
  TensorView seed;                // int64, default: the row's index
  TensorView position;            // int64, default 0: the draw's number in its sequence

  TensorView out;  // (batch), int32 or int64, written
};

size_t sample_workspace_size(const SampleArgs& args, const Context& context);

// Throws Error(invalid_argument) for settings out of range and for a row whose logits hold a NaN
// or no finite value.
void sample(const SampleArgs& args, const Exec& exec);

}  // namespace ssmcore
