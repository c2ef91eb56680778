// The norm with residual addition, as between the layers of a model: x and out are activations, the
// residual is float32; and the gradients, of which that of the residual sum goes on in float32 and
// in the activations' dtype. R rows of D; an element is one of x.
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

void rms_norm_bwd(nvbench::state& state) {
  const Shape shape(state);
  const int64_t rows = shape['R'], dim = shape['D'];
  const Context context(device_of(state));
  const Random r(context, -1, 1, {rows, dim}, DType::float32),
      dr(context, -1, 1, {rows, dim}, DType::float32),
      dout(context, -1, 1, {rows, dim}, shape.dtype()),
      dx(context, -1, 1, {rows, dim}, shape.dtype()), weight(context, 0.5, 2, {dim}, shape.dtype()),
      dweight(context, -1, 1, {dim}, shape.dtype());
  RmsNormBwdArgs args;
  args.x = r.view();
  args.weight = weight.view();
  args.dout = dout.view();
  args.dresidual_out = args.dresidual.tensor = dr.view();
  args.dx.tensor = dx.view();
  args.dweight.tensor = dweight.view();
  measure(state, context, rms_norm_bwd_workspace_size, ssmcore::rms_norm_bwd, args, args.x.numel(),
          bytes_of({args.x, args.weight, args.dout, args.dresidual_out, args.dresidual.tensor,
                    args.dx.tensor, args.dweight.tensor}));
}

NVBENCH_BENCH(rms_norm)
    .set_name("rms_norm_fwd")
    .add_string_axis("shape",
                     {"R16384 D2560 bf16", "R64 D2560 bf16", "R1 D2560 bf16", "R16384 D2560 fp32"});

NVBENCH_BENCH(rms_norm_bwd)
    .add_string_axis("shape", {"R16384 D2560 bf16", "R65536 D256 bf16", "R64 D2560 bf16",
                               "R16384 D2560 fp32"});

}  // namespace
}  // namespace ssmcore::bench
