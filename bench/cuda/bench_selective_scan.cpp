// The selective scan with D, z, delta_bias and softplus. An element is one of u.
#include "ssmcore/selective_scan.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

void selective_scan(nvbench::state& state) {
  const Shape shape(state);
  const int64_t batch = shape['B'], dim = shape['D'], seqlen = shape['L'], dstate = shape['N'];
  const Context context(device_of(state));
  const auto sequence = [&](float least, float most, int64_t rows) {
    return RandomSequence(state, context, least, most, batch, rows, seqlen, shape.dtype());
  };
  const RandomSequence u = sequence(-1, 1, dim), z = sequence(-2, 2, dim),
                       delta = sequence(-1, 1, dim), B = sequence(-1, 1, dstate),
                       C = sequence(-1, 1, dstate), out = sequence(-1, 1, dim);
  // Ranges of a trained model: A from -16 to -1, Δ around 0.01.
  const Random A(context, -16, -1, {dim, dstate}, DType::float32),
      D(context, -1, 1, {dim}, DType::float32), delta_bias(context, -6, -3, {dim}, DType::float32);

  SelectiveScanFwdArgs args;
  args.u = u.view();
  args.delta = delta.view();
  args.A = A.view();
  args.B = B.view();
  args.C = C.view();
  args.D = D.view();
  args.z = z.view();
  args.delta_bias = delta_bias.view();
  args.delta_softplus = true;
  args.out = out.view();
  measure(state, context, selective_scan_fwd_workspace_size, selective_scan_fwd, args,
          args.u.numel(),
          bytes_of({args.u, args.delta, args.A, args.B, args.C, args.D, args.z, args.delta_bias,
                    args.out}));
}

NVBENCH_BENCH(selective_scan)
    .set_name("selective_scan_fwd")
    .add_string_axis("shape", {"B8 D4096 L2048 N16 bf16", "B8 D5120 L2048 N16 bf16",
                               "B1 D4096 L2048 N16 bf16", "B1 D1024 L65536 N16 bf16",
                               "B1 D2048 L524288 N16 bf16", "B8 D4096 L2048 N64 bf16",
                               "B8 D4096 L2048 N16 fp32"})
    .add_string_axis("layout", {kSeqlenContiguous, kDimContiguous});

}  // namespace
}  // namespace ssmcore::bench
