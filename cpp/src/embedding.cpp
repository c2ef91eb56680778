#include "ssmcore/embedding.h"

#include "checks.h"
#include "kernels.h"

namespace ssmcore {
namespace {

constexpr const char* kBwd = "embedding_bwd";

EmbeddingParams lower(const EmbeddingArgs& args, const Context& context) {
  const Checks check("embedding", context.device());
  const TensorView& weight = args.weight.data;
  check.rank(args.token_ids, "token_ids", 1, "(rows)");
  check.rank(weight, "weight", 2, "(vocab_size, d_model)");
  const Dim rows{"rows", args.token_ids.shape[0]}, vocab_size{"vocab_size", weight.shape[0]},
      d_model{"d_model", weight.shape[1]};
  check.input(args.token_ids, "token_ids", {rows}, {DType::int32, DType::int64});
  check.input(weight, "weight", {vocab_size, d_model}, activation_or_double(context.device()));
  check.require(d_model.size == 1 || weight.strides[1] == 1, [&] {
    return "weight has stride " + std::to_string(weight.strides[1]) +
           " along d_model, expected 1: rows must be contiguous";
  });
  check.output(args.out, "out", {rows, d_model}, any_beside(weight.dtype));
  check.token_ids(args.token_ids, vocab_size.size);

  EmbeddingParams params{};
  params.index_dtype = args.token_ids.dtype;
  params.weight_dtype = weight.dtype;
  params.out_dtype = args.out.dtype;
  params.rows = rows.size;
  params.vocab_size = vocab_size.size;
  params.d_model = d_model.size;
  params.token_ids = Strided<1>(args.token_ids);
  params.weight = weight.data;
  params.weight_row_stride = weight.strides[0];
  params.out = Strided<2>(args.out);
  return params;
}

EmbeddingBwdParams lower(const EmbeddingBwdArgs& args, const Context& context) {
  const Checks check(kBwd, context.device());
  const TensorView& dweight = args.dweight.tensor;
  check.rank(args.token_ids, "token_ids", 1, "(rows)");
  check.rank(args.dout, "dout", 2, "(rows, d_model)");
  check.rank(dweight, "dweight", 2, "(vocab_size, d_model)");
  const Dim rows{"rows", args.token_ids.shape[0]}, vocab_size{"vocab_size", dweight.shape[0]},
      d_model{"d_model", args.dout.shape[1]};
  check.input(args.token_ids, "token_ids", {rows}, {DType::int32, DType::int64});
  check.input(args.dout, "dout", {rows, d_model}, activation_or_double(context.device()));
  check.output(dweight, "dweight", {vocab_size, d_model}, any_beside(args.dout.dtype));
  check.token_ids(args.token_ids, vocab_size.size);

  EmbeddingBwdParams params{};
  params.index_dtype = args.token_ids.dtype;
  params.dout_dtype = args.dout.dtype;
  params.rows = rows.size;
  params.vocab_size = vocab_size.size;
  params.d_model = d_model.size;
  params.token_ids = Strided<1>(args.token_ids);
  params.dout = Strided<2>(args.dout);
  params.dweight = StridedGradient<2>(args.dweight);
  return params;
}

}  // namespace

void embedding(const EmbeddingArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  const Checks check("embedding", exec.context.device());
  check.disjoint(args.out, "out", args.weight.data, "weight");
  check.disjoint(args.out, "out", args.token_ids, "token_ids");
  launch("embedding", kernel_table(exec.context).embedding, params, exec);
}

size_t embedding_bwd_workspace_size(const EmbeddingBwdArgs& args, const Context& context) {
  return kernel_table(context).embedding_bwd.workspace_size(lower(args, context), context);
}

void embedding_bwd(const EmbeddingBwdArgs& args, const Exec& exec) {
  const auto params = lower(args, exec.context);
  Checks(kBwd, exec.context.device())
      .disjoint_gradients({{args.dweight.tensor, "dweight"}},
                          {{args.token_ids, "token_ids"}, {args.dout, "dout"}});
  launch(kBwd, kernel_table(exec.context).embedding_bwd, params, exec);
}

}  // namespace ssmcore
