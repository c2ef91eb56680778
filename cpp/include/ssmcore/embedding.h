// Rows of a table by token id.
#pragma once

#include "ssmcore/context.h"
#include "ssmcore/gradient.h"
#include "ssmcore/tensor.h"
#include "ssmcore/weight.h"

namespace ssmcore {

// out[i] = weight[token_ids[i]]. Or everything is float64, for checking on the CPU.
struct EmbeddingArgs {
  TensorView token_ids;  // (rows), int32 or int64, each in [0, weight rows)
  Weight weight;         // (vocab_size, d_model)
  TensorView out;        // (rows, d_model), written: float32, bfloat16 or float16
};

void embedding(const EmbeddingArgs& args, const Exec& exec);

// dweight[id] = Σ dout over the rows with that id, in their order, accumulated in float32.
struct EmbeddingBwdArgs {
  TensorView token_ids;  // (rows), int32 or int64, each in [0, vocab_size)
  TensorView dout;       // (rows, d_model): float32, bfloat16 or float16
  Gradient dweight;      // (vocab_size, d_model): float32, bfloat16 or float16; overlaps no input
};

size_t embedding_bwd_workspace_size(const EmbeddingBwdArgs& args, const Context& context);

void embedding_bwd(const EmbeddingBwdArgs& args, const Exec& exec);

}  // namespace ssmcore
