// What sampling's kernels are given, already checked. See ssmcore/sample.h.
#pragma once

#include "strided.h"

namespace ssmcore {

struct SampleParams {
  DType history_dtype, out_dtype;
  int64_t batch, vocab_size, history_length;

  Strided<2> logits;   // (batch, vocab_size), float32
  Strided<2> history;  // (batch, history_length)
  Strided<1> repetition_penalty, temperature, top_k, top_p, min_p, seed, position;  // (batch)
  Strided<1> out;                                                                   // (batch)
};

struct SampleArgs;

// Throws Error(invalid_argument) for a setting out of its range, of those in memory of the host.
void check_sample_settings(const SampleArgs& args);

}  // namespace ssmcore
