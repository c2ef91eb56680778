// The convolution with bias and SiLU, its gradients, and its update for one token. An element is
// one of x.
#include "ssmcore/causal_conv1d.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

void causal_conv1d(nvbench::state& state) {
  const Shape shape(state);
  const int64_t batch = shape['B'], dim = shape['D'], seqlen = shape['L'], width = shape['W'];
  const Context context(device_of(state));
  const RandomSequence x(state, context, -1, 1, batch, dim, seqlen, shape.dtype()),
      out(state, context, -1, 1, batch, dim, seqlen, shape.dtype());
  const Random weight(context, -1, 1, {dim, width}, shape.dtype()),
      bias(context, -1, 1, {dim}, shape.dtype());
  CausalConv1dFwdArgs args;
  args.x = x.view();
  args.weight = weight.view();
  args.bias = bias.view();
  args.activation = Activation::silu;
  args.out = out.view();
  measure(state, context, causal_conv1d_fwd_workspace_size, causal_conv1d_fwd, args, args.x.numel(),
          bytes_of({args.x, args.weight, args.bias, args.out}));
}

void causal_conv1d_bwd(nvbench::state& state) {
  const Shape shape(state);
  const int64_t batch = shape['B'], dim = shape['D'], seqlen = shape['L'], width = shape['W'];
  const Context context(device_of(state));
  const auto sequence = [&] {
    return RandomSequence(state, context, -1, 1, batch, dim, seqlen, shape.dtype());
  };
  const auto random = [&](std::initializer_list<int64_t> sizes) {
    return Random(context, -1, 1, sizes, shape.dtype());
  };
  const RandomSequence x = sequence(), dout = sequence(), dx = sequence();
  const Random weight = random({dim, width}), bias = random({dim}), dweight = random({dim, width}),
               dbias = random({dim});
  CausalConv1dBwdArgs args;
  args.x = x.view();
  args.weight = weight.view();
  args.bias = bias.view();
  args.activation = Activation::silu;
  args.dout = dout.view();
  args.dx.tensor = dx.view();
  args.dweight.tensor = dweight.view();
  args.dbias.tensor = dbias.view();
  measure(state, context, causal_conv1d_bwd_workspace_size, ssmcore::causal_conv1d_bwd, args,
          args.x.numel(),
          bytes_of({args.x, args.dout, args.weight, args.bias, args.dx.tensor, args.dweight.tensor,
                    args.dbias.tensor}));
}

// States and weights have channels contiguous, as the models keep them.
void causal_conv1d_update(nvbench::state& state) {
  const Shape shape(state);
  const int64_t batch = shape['B'], dim = shape['D'], width = shape['W'];
  const Context context(device_of(state));
  const auto random = [&](std::initializer_list<int64_t> sizes) {
    return Random(context, -1, 1, sizes, shape.dtype());
  };
  const Random x = random({batch, dim}), conv_state = random({batch, width - 1, dim}),
               weight = random({width, dim}), bias = random({dim}), out = random({batch, dim});
  CausalConv1dUpdateArgs args;
  args.x = x.view();
  args.conv_state = conv_state.view().transpose(1, 2);
  args.weight = weight.view().transpose(0, 1);
  args.bias = bias.view();
  args.activation = Activation::silu;
  args.out = out.view();
  measure(state, context, causal_conv1d_update_workspace_size, ssmcore::causal_conv1d_update, args,
          args.x.numel(),
          bytes_of({args.x, args.conv_state, args.conv_state, args.weight, args.bias, args.out}));
}

NVBENCH_BENCH(causal_conv1d)
    .set_name("causal_conv1d_fwd")
    .add_string_axis("shape", {"B8 D4096 L2048 W4 bf16", "B1 D4096 L2048 W4 bf16",
                               "B1 D1024 L65536 W4 bf16", "B8 D4096 L2048 W4 fp32"})
    .add_string_axis("layout", {kSeqlenContiguous, kDimContiguous});
NVBENCH_BENCH(causal_conv1d_bwd)
    .add_string_axis("shape", {"B8 D4096 L2048 W4 bf16", "B1 D4096 L2048 W4 bf16",
                               "B1 D1024 L65536 W4 bf16", "B8 D4096 L2048 W4 fp32"})
    .add_string_axis("layout", {kSeqlenContiguous, kDimContiguous});
NVBENCH_BENCH(causal_conv1d_update)
    .add_string_axis("shape", {"B256 D5120 W4 bf16", "B1 D5120 W4 bf16"});

}  // namespace
}  // namespace ssmcore::bench
