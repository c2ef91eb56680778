// Rows of a table of V by D, for R tokens; and their gradient, in float32. An element is one of
// out, or of its gradient.
#include "ssmcore/embedding.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

size_t no_workspace(const EmbeddingArgs&, const Context&) {
  return 0;
}

void embedding(nvbench::state& state) {
  const Shape shape(state);
  const int64_t rows = shape['R'], vocab_size = shape['V'], d_model = shape['D'];
  const Context context(device_of(state));
  const Random token_ids(context, 0, vocab_size, {rows}, DType::int64),
      weight(context, -1, 1, {vocab_size, d_model}, shape.dtype()),
      out(context, -1, 1, {rows, d_model}, shape.dtype());
  EmbeddingArgs args;
  args.token_ids = token_ids.view();
  args.weight = weight.view();
  args.out = out.view();
  // As many bytes of the table are read as of out are written.
  measure(state, context, no_workspace, ssmcore::embedding, args, args.out.numel(),
          bytes_of({args.token_ids, args.out, args.out}));
}

void embedding_bwd(nvbench::state& state) {
  const Shape shape(state);
  const int64_t rows = shape['R'], vocab_size = shape['V'], d_model = shape['D'];
  const Context context(device_of(state));
  const Random token_ids(context, 0, vocab_size, {rows}, DType::int64),
      dout(context, -1, 1, {rows, d_model}, shape.dtype()),
      dweight(context, -1, 1, {vocab_size, d_model}, DType::float32);
  EmbeddingBwdArgs args;
  args.token_ids = token_ids.view();
  args.dout = dout.view();
  args.dweight.tensor = dweight.view();
  measure(state, context, embedding_bwd_workspace_size, ssmcore::embedding_bwd, args,
          args.dout.numel(), bytes_of({args.token_ids, args.dout, args.dweight.tensor}));
}

NVBENCH_BENCH(embedding_bwd)
    .add_string_axis("shape", {"R65536 V256 D256 bf16", "R65536 V50280 D2560 bf16",
                               "R16384 V50280 D2560 bf16"});

NVBENCH_BENCH(embedding).add_string_axis("shape",
                                         {"R16384 V50280 D2560 bf16", "R64 V50280 D2560 bf16",
                                          "R1 V50280 D2560 bf16", "R16384 V50280 D2560 fp32"});

}  // namespace
}  // namespace ssmcore::bench
