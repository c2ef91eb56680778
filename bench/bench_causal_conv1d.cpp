// The convolution with SiLU at the size of one layer of mamba-130m: B 1, L 512, D 1536, W 4,
// float32; its gradients; and its update for one token.
#include "ssmcore/causal_conv1d.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

constexpr int64_t kBatch = 1, kSeqlen = 512, kDim = 1536, kWidth = 4;

void bench_causal_conv1d(benchmark::State& state) {
  const Layout layout = static_cast<Layout>(state.range(0));
  const RandomSequence x(layout, -1, 1, kBatch, kDim, kSeqlen),
      out(layout, 0, 0, kBatch, kDim, kSeqlen);
  const Random weight(-1, 1, {kDim, kWidth}), bias(-1, 1, {kDim});
  CausalConv1dFwdArgs args;
  args.x = x.view();
  args.weight = weight.view();
  args.bias = bias.view();
  args.activation = Activation::silu;
  args.out = out.view();
  measure(state, state.range(1), causal_conv1d_fwd_workspace_size, causal_conv1d_fwd, args);
  state.SetLabel(layout_name(layout));
  state.SetBytesProcessed(state.iterations() * 2 * kBatch * kDim * kSeqlen * sizeof(float));
}

void bench_causal_conv1d_bwd(benchmark::State& state) {
  const Layout layout = static_cast<Layout>(state.range(0));
  const RandomSequence x(layout, -1, 1, kBatch, kDim, kSeqlen),
      dout(layout, -1, 1, kBatch, kDim, kSeqlen), dx(layout, 0, 0, kBatch, kDim, kSeqlen);
  const Random weight(-1, 1, {kDim, kWidth}), bias(-1, 1, {kDim}), dweight(0, 0, {kDim, kWidth}),
      dbias(0, 0, {kDim});
  CausalConv1dBwdArgs args;
  args.x = x.view();
  args.weight = weight.view();
  args.bias = bias.view();
  args.activation = Activation::silu;
  args.dout = dout.view();
  args.dx.tensor = dx.view();
  args.dweight.tensor = dweight.view();
  args.dbias.tensor = dbias.view();
  measure(state, state.range(1), causal_conv1d_bwd_workspace_size, causal_conv1d_bwd, args);
  state.SetLabel(layout_name(layout));
  state.SetBytesProcessed(state.iterations() * 3 * kBatch * kDim * kSeqlen * sizeof(float));
}

void bench_causal_conv1d_update(benchmark::State& state) {
  const int64_t batch = state.range(0);
  const Random x(-1, 1, {batch, kDim}), conv_state(-1, 1, {batch, kWidth - 1, kDim}),
      weight(-1, 1, {kWidth, kDim}), bias(-1, 1, {kDim}), out(0, 0, {batch, kDim});
  CausalConv1dUpdateArgs args;
  args.x = x.view();
  args.conv_state = conv_state.view().transpose(1, 2);
  args.weight = weight.view().transpose(0, 1);
  args.bias = bias.view();
  args.activation = Activation::silu;
  args.out = out.view();
  measure(state, state.range(1), causal_conv1d_update_workspace_size, causal_conv1d_update, args);
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"layout", "threads"});
  for (const int64_t layout : {kSeqlenContiguous, kDimContiguous})
    for (const int threads : thread_counts()) benchmark->Args({layout, threads});
}

void update_cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"batch", "threads"});
  for (const int64_t batch : {1, 8}) benchmark->Args({batch, 1});
}

BENCHMARK(bench_causal_conv1d)->Apply(cases)->Unit(benchmark::kMicrosecond)->UseRealTime();
BENCHMARK(bench_causal_conv1d_bwd)->Apply(cases)->Unit(benchmark::kMicrosecond)->UseRealTime();
BENCHMARK(bench_causal_conv1d_update)
    ->Apply(update_cases)
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

}  // namespace
}  // namespace ssmcore::bench
