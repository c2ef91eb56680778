// What the embedding's kernels are given, already checked. See ssmcore/embedding.h.
#pragma once

#include "strided.h"

namespace ssmcore {

struct EmbeddingParams {
  DType index_dtype, weight_dtype, out_dtype;
  int64_t rows, vocab_size, d_model;

  Strided<1> token_ids;  // (rows)
  const void* weight;    // (vocab_size, d_model), each row contiguous
  int64_t weight_row_stride;
  Strided<2> out;  // (rows, d_model)
};

struct EmbeddingBwdParams {
  DType index_dtype, dout_dtype;
  int64_t rows, vocab_size, d_model;

  Strided<1> token_ids;        // (rows)
  Strided<2> dout;             // (rows, d_model)
  StridedGradient<2> dweight;  // (vocab_size, d_model)
};

}  // namespace ssmcore
