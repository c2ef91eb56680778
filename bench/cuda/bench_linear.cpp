// The products of a block of d_model 2560 (in_proj, x_proj, dt_proj, out_proj) for 8 prompts of
// 2048 tokens, and in_proj and the head for decoding, which streams weights. x (M, K) times weight
// (N, K); an element is one of out.
#include "ssmcore/linear.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

void linear(nvbench::state& state) {
  const Shape shape(state);
  const int64_t rows = shape['M'], out_features = shape['N'], in_features = shape['K'];
  const Context context(device_of(state));
  const Random x(context, -1, 1, {rows, in_features}, shape.dtype()),
      weight(context, -1, 1, {out_features, in_features}, shape.dtype()),
      out(context, -1, 1, {rows, out_features}, shape.dtype());
  LinearArgs args;
  args.x = x.view();
  args.weight = weight.view();
  args.out = out.view();
  measure(state, context, linear_workspace_size, ssmcore::linear, args, args.out.numel(),
          bytes_of({args.x, args.weight.data, args.out}));
  if (const double seconds = median_seconds(state))
    add_column(state, "TFLOP/s", 2e-12 * rows * out_features * in_features / seconds);
}

NVBENCH_BENCH(linear).add_string_axis("shape", {"M16384 N10240 K2560 bf16",
                                                "M16384 N192 K5120 bf16", "M16384 N5120 K160 bf16",
                                                "M16384 N2560 K5120 bf16", "M64 N10240 K2560 bf16",
                                                "M1 N10240 K2560 bf16", "M64 N50280 K2560 bf16",
                                                "M1 N50280 K2560 bf16", "M16384 N2560 K5120 fp32"});

}  // namespace
}  // namespace ssmcore::bench
