// The selective scan with D, z, delta_bias and softplus, forward and backward. An element is one of
// u.
#include "ssmcore/selective_scan.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

// Ranges of a trained model: A from -16 to -1, Δ around 0.01.
struct Inputs {
  const nvbench::state& state;
  const Shape shape{state};
  const int64_t batch = shape['B'], dim = shape['D'], seqlen = shape['L'], dstate = shape['N'];
  const Context context{device_of(state)};
  const RandomSequence u = sequence(-1, 1, dim), z = sequence(-2, 2, dim),
                       delta = sequence(-1, 1, dim), B = sequence(-1, 1, dstate),
                       C = sequence(-1, 1, dstate), out = sequence(-1, 1, dim);
  const Random A{context, -16, -1, {dim, dstate}, DType::float32},
      D{context, -1, 1, {dim}, DType::float32}, delta_bias{context, -6, -3, {dim}, DType::float32};

  explicit Inputs(const nvbench::state& state) : state(state) {}

  RandomSequence sequence(float least, float most, int64_t rows) const {
    return RandomSequence(state, context, least, most, batch, rows, seqlen, shape.dtype());
  }
  template <typename Args>
  void give(Args& args) const {
    args.u = u.view();
    args.delta = delta.view();
    args.A = A.view();
    args.B = B.view();
    args.C = C.view();
    args.D = D.view();
    args.z = z.view();
    args.delta_bias = delta_bias.view();
    args.delta_softplus = true;
  }
};

void selective_scan(nvbench::state& state) {
  const Inputs inputs(state);
  SelectiveScanFwdArgs args;
  inputs.give(args);
  args.out = inputs.out.view();
  measure(state, inputs.context, selective_scan_fwd_workspace_size, selective_scan_fwd, args,
          args.u.numel(),
          bytes_of({args.u, args.delta, args.A, args.B, args.C, args.D, args.z, args.delta_bias,
                    args.out}));
}

// All gradients; "states" says whether those that the forward saved every 32 steps are given.
void selective_scan_backward(nvbench::state& state) {
  constexpr int64_t kChunkSize = 32;
  const Inputs inputs(state);
  const int64_t chunks = (inputs.seqlen + kChunkSize - 1) / kChunkSize;
  const Random chunk_states(inputs.context, -1, 1,
                            {inputs.batch, chunks, inputs.dim, inputs.dstate}, DType::float32);
  const auto like = [&](const Random& parameter) {
    const TensorView view = parameter.view();
    return view.rank == 1
               ? Random(inputs.context, 0, 0, {view.shape[0]}, DType::float32)
               : Random(inputs.context, 0, 0, {view.shape[0], view.shape[1]}, DType::float32);
  };
  const RandomSequence du = inputs.sequence(0, 0, inputs.dim),
                       ddelta = inputs.sequence(0, 0, inputs.dim),
                       dz = inputs.sequence(0, 0, inputs.dim),
                       dB = inputs.sequence(0, 0, inputs.dstate),
                       dC = inputs.sequence(0, 0, inputs.dstate);
  const Random dA = like(inputs.A), dD = like(inputs.D), ddelta_bias = like(inputs.delta_bias);

  SelectiveScanBwdArgs args;
  inputs.give(args);
  args.dout = inputs.out.view();
  if (state.get_string("states") == "saved") {
    args.chunk_states = chunk_states.view();
    args.chunk_size = kChunkSize;
  }
  args.du.tensor = du.view();
  args.ddelta.tensor = ddelta.view();
  args.dA.tensor = dA.view();
  args.dB.tensor = dB.view();
  args.dC.tensor = dC.view();
  args.dD.tensor = dD.view();
  args.dz.tensor = dz.view();
  args.ddelta_bias.tensor = ddelta_bias.view();
  measure(state, inputs.context, selective_scan_bwd_workspace_size, selective_scan_bwd, args,
          args.u.numel(),
          bytes_of({args.u, args.delta, args.A, args.B, args.C, args.D, args.z, args.delta_bias,
                    args.dout, args.chunk_states, args.du.tensor, args.ddelta.tensor,
                    args.dA.tensor, args.dB.tensor, args.dC.tensor, args.dD.tensor, args.dz.tensor,
                    args.ddelta_bias.tensor}));
  add_column(state, "workspace MB",
             static_cast<double>(selective_scan_bwd_workspace_size(args, inputs.context)) * 1e-6);
}

NVBENCH_BENCH(selective_scan)
    .set_name("selective_scan_fwd")
    .add_string_axis("shape", {"B8 D4096 L2048 N16 bf16", "B8 D5120 L2048 N16 bf16",
                               "B1 D4096 L2048 N16 bf16", "B1 D1024 L65536 N16 bf16",
                               "B1 D2048 L524288 N16 bf16", "B8 D4096 L2048 N64 bf16",
                               "B8 D4096 L2048 N16 fp32"})
    .add_string_axis("layout", {kSeqlenContiguous, kDimContiguous});

NVBENCH_BENCH(selective_scan_backward)
    .set_name("selective_scan_bwd")
    .add_string_axis("shape", {"B8 D4096 L2048 N16 bf16", "B8 D5120 L2048 N16 bf16",
                               "B1 D4096 L2048 N16 bf16", "B1 D1024 L65536 N16 bf16",
                               "B8 D4096 L2048 N16 fp32"})
    .add_string_axis("layout", {kSeqlenContiguous, kDimContiguous})
    .add_string_axis("states", {"saved", "none"});

}  // namespace
}  // namespace ssmcore::bench
