// The norm with residual addition, as between the layers of a model: x and out are activations, the
// residual is float32. R rows of D; an element is one of x.
#include "ssmcore/rms_norm.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

void rms_norm(nvbench::state& state) {
  const Shape shape(state);
  const int64_t rows = shape['R'], dim = shape['D'];
  const Context context(device_of(state));
  const Random x(context, -1, 1, {rows, dim}, shape.dtype()),
      out(context, -1, 1, {rows, dim}, shape.dtype()),
      weight(context, 0.5, 2, {dim}, shape.dtype()),
      residual(context, -1, 1, {rows, dim}, DType::float32),
      residual_out(context, -1, 1, {rows, dim}, DType::float32);
  RmsNormFwdArgs args;
  args.x = x.view();
  args.residual = residual.view();
  args.residual_out = residual_out.view();
  args.weight = weight.view();
  args.out = out.view();
  measure(state, context, rms_norm_fwd_workspace_size, rms_norm_fwd, args, args.x.numel(),
          bytes_of({args.x, args.residual, args.residual_out, args.weight, args.out}));
}

NVBENCH_BENCH(rms_norm)
    .set_name("rms_norm_fwd")
    .add_string_axis("shape",
                     {"R16384 D2560 bf16", "R64 D2560 bf16", "R1 D2560 bf16", "R16384 D2560 fp32"});

}  // namespace
}  // namespace ssmcore::bench
