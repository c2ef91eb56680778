// The products of a block of d_model 2560 (in_proj, x_proj, dt_proj, out_proj) for 8 prompts of
// 2048 tokens, and in_proj and the head for decoding, which streams weights. x (M, K) times weight
// (N, K); an element is one of out. And the gradients of such a block's products for training, one
// at a time: an element is one of the gradient.
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

void linear_bwd(nvbench::state& state) {
  const Shape shape(state);
  const int64_t rows = shape['M'], out_features = shape['N'], in_features = shape['K'];
  const Context context(device_of(state));
  const Random x(context, -1, 1, {rows, in_features}, shape.dtype()),
      weight(context, -1, 1, {out_features, in_features}, shape.dtype()),
      dout(context, -1, 1, {rows, out_features}, shape.dtype()),
      dx(context, -1, 1, {rows, in_features}, shape.dtype()),
      dweight(context, -1, 1, {out_features, in_features}, DType::float32),
      dbias(context, -1, 1, {out_features}, DType::float32);
  LinearBwdArgs args;
  args.dout = dout.view();
  const std::string which = state.get_string("gradient");
  double bytes = bytes_of({args.dout}), products = 0;
  TensorView gradient;
  if (which == "dx") {
    args.weight = weight.view();
    args.dx.tensor = gradient = dx.view();
    bytes += bytes_of({args.weight.data, gradient});
    products = static_cast<double>(rows) * out_features * in_features;
  } else if (which == "dweight") {
    args.x = x.view();
    args.dweight.tensor = gradient = dweight.view();
    bytes += bytes_of({args.x, gradient});
    products = static_cast<double>(rows) * out_features * in_features;
  } else {
    args.dbias.tensor = gradient = dbias.view();
  }
  measure(state, context, linear_bwd_workspace_size, ssmcore::linear_bwd, args, gradient.numel(),
          bytes);
  if (const double seconds = median_seconds(state))
    add_column(state, "TFLOP/s", 2e-12 * products / seconds);
}

NVBENCH_BENCH(linear_bwd)
    .add_string_axis("shape", {"M16384 N10240 K2560 bf16", "M16384 N192 K5120 bf16",
                               "M16384 N5120 K160 bf16", "M16384 N2560 K5120 bf16"})
    .add_string_axis("gradient", {"dx", "dweight", "dbias"});

}  // namespace
}  // namespace ssmcore::bench
