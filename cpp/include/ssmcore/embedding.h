// Rows of a table by token id.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/tensor.h"
#include "ssmcore/weight.h"

namespace ssmcore {

// out[i] = weight[token_ids[i]].
struct EmbeddingArgs {
  TensorView token_ids;  // (rows), int32 or int64, each in [0, weight rows)
  Weight weight;         // (vocab_size, d_model)
  TensorView out;        // (rows, d_model), written: float32, bfloat16 or float16
};

void embedding(const EmbeddingArgs& args, const Exec& exec);

}  // namespace ssmcore
