// One decoding step of the scan with D, z, dt_bias and softplus. An element is one of x.
#include "ssmcore/selective_state_update.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

void selective_state_update(nvbench::state& state) {
  const Shape shape(state);
  const int64_t batch = shape['B'], dim = shape['D'], dstate = shape['N'];
  // The models keep channels contiguous, in states as in A.
  const bool dim_contiguous = state.get_string("layout") == kDimContiguous;
  const Context context(device_of(state));
  const auto rows = [&](float least, float most, int64_t length) {
    return Random(context, least, most, {batch, length}, shape.dtype());
  };
  const auto parameter = [&](float least, float most, std::initializer_list<int64_t> sizes) {
    return Random(context, least, most, sizes, DType::float32);
  };
  const Random x = rows(-1, 1, dim), dt = rows(-1, 1, dim), z = rows(-2, 2, dim),
               B = rows(-1, 1, dstate), C = rows(-1, 1, dstate), out = rows(-1, 1, dim),
               D = parameter(-1, 1, {dim}), dt_bias = parameter(-6, -3, {dim}),
               A = dim_contiguous ? parameter(-16, -1, {dstate, dim})
                                  : parameter(-16, -1, {dim, dstate}),
               states = dim_contiguous ? parameter(-1, 1, {batch, dstate, dim})
                                       : parameter(-1, 1, {batch, dim, dstate});

  SelectiveStateUpdateArgs args;
  args.state = dim_contiguous ? states.view().transpose(1, 2) : states.view();
  args.x = x.view();
  args.dt = dt.view();
  args.A = dim_contiguous ? A.view().transpose(0, 1) : A.view();
  args.B = B.view();
  args.C = C.view();
  args.D = D.view();
  args.z = z.view();
  args.dt_bias = dt_bias.view();
  args.dt_softplus = true;
  args.out = out.view();
  measure(state, context, selective_state_update_workspace_size, ssmcore::selective_state_update,
          args, args.x.numel(),
          bytes_of({args.state, args.state, args.x, args.dt, args.A, args.B, args.C, args.D, args.z,
                    args.dt_bias, args.out}));
}

NVBENCH_BENCH(selective_state_update)
    .add_string_axis("shape", {"B256 D5120 N16 bf16", "B64 D5120 N16 bf16", "B1 D5120 N16 bf16",
                               "B256 D5120 N64 bf16", "B256 D5120 N16 fp32"})
    .add_string_axis("layout", {"N-contiguous", kDimContiguous});

}  // namespace
}  // namespace ssmcore::bench
