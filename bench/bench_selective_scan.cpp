// The selective scan at the size of one layer of mamba-130m: B 1, L 512, D 1536, N 16, float32,
// with D, z, delta_bias and softplus.
#include "ssmcore/selective_scan.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

constexpr int64_t kBatch = 1, kSeqlen = 512, kDim = 1536, kDstate = 16;

// The inputs of a layer, in ranges of a trained model: A from -16 to -1, Δ around 0.01.
struct Layer {
  Layout layout;
  RandomSequence u, z, delta, B, C, out;
  Random A{-16, -1, {kDim, kDstate}}, D{-1, 1, {kDim}}, delta_bias{-6, -3, {kDim}};

  explicit Layer(Layout layout)
      : layout(layout),
        u(sequence(-1, 1, kDim)),
        z(sequence(-2, 2, kDim)),
        delta(sequence(-1, 1, kDim)),
        B(sequence(-1, 1, kDstate)),
        C(sequence(-1, 1, kDstate)),
        out(sequence(-1, 1, kDim)) {}

  RandomSequence sequence(float least, float most, int64_t rows) const {
    return RandomSequence(layout, least, most, kBatch, rows, kSeqlen);
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

void finish(benchmark::State& state, Layout layout) {
  state.SetLabel(layout_name(layout));
  // Updates of one state, h[b, d, n](t), a second.
  state.SetItemsProcessed(state.iterations() * kBatch * kSeqlen * kDim * kDstate);
}

void bench_selective_scan(benchmark::State& state) {
  const Layer layer(static_cast<Layout>(state.range(0)));
  SelectiveScanFwdArgs args;
  layer.give(args);
  args.out = layer.out.view();
  measure(state, state.range(1), selective_scan_fwd_workspace_size, selective_scan_fwd, args);
  finish(state, layer.layout);
}

// All gradients, from states saved every `chunk_size` steps; 0: none were saved.
void bench_selective_scan_bwd(benchmark::State& state) {
  const Layer layer(static_cast<Layout>(state.range(0)));
  const int64_t chunk_size = state.range(2);
  const RandomSequence du = layer.sequence(0, 0, kDim), ddelta = layer.sequence(0, 0, kDim),
                       dz = layer.sequence(0, 0, kDim), dB = layer.sequence(0, 0, kDstate),
                       dC = layer.sequence(0, 0, kDstate);
  const Random dA(0, 0, {kDim, kDstate}), dD(0, 0, {kDim}), ddelta_bias(0, 0, {kDim});
  const int64_t chunks = chunk_size == 0 ? 1 : kSeqlen / chunk_size;
  const Random chunk_states(-1, 1, {kBatch, chunks, kDim, kDstate});

  SelectiveScanBwdArgs args;
  layer.give(args);
  args.dout = layer.out.view();
  if (chunk_size > 0) args.chunk_states = chunk_states.view();
  args.chunk_size = chunk_size;
  args.du.tensor = du.view();
  args.ddelta.tensor = ddelta.view();
  args.dA.tensor = dA.view();
  args.dB.tensor = dB.view();
  args.dC.tensor = dC.view();
  args.dD.tensor = dD.view();
  args.dz.tensor = dz.view();
  args.ddelta_bias.tensor = ddelta_bias.view();
  measure(state, state.range(1), selective_scan_bwd_workspace_size, selective_scan_bwd, args);
  finish(state, layer.layout);
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"layout", "threads"});
  for (const int64_t layout : {kSeqlenContiguous, kDimContiguous})
    for (const int threads : thread_counts()) benchmark->Args({layout, threads});
}

void cases_bwd(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"layout", "threads", "chunk_size"});
  for (const int64_t layout : {kSeqlenContiguous, kDimContiguous})
    for (const int threads : thread_counts())
      for (const int64_t chunk_size : {0, 32}) benchmark->Args({layout, threads, chunk_size});
}

BENCHMARK(bench_selective_scan)->Apply(cases)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(bench_selective_scan_bwd)->Apply(cases_bwd)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace ssmcore::bench
