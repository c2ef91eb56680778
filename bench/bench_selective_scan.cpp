// The selective scan at the size of one layer of mamba-130m: B 1, L 512, D 1536, N 16, float32,
// with D, z, delta_bias and softplus.
#include "ssmcore/selective_scan.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

constexpr int64_t kBatch = 1, kSeqlen = 512, kDim = 1536, kDstate = 16;

void bench_selective_scan(benchmark::State& state) {
  const Layout layout = static_cast<Layout>(state.range(0));
  const auto sequence = [&](float least, float most, int64_t rows) {
    return RandomSequence(layout, least, most, kBatch, rows, kSeqlen);
  };
  const RandomSequence u = sequence(-1, 1, kDim), z = sequence(-2, 2, kDim),
                       delta = sequence(-1, 1, kDim), B = sequence(-1, 1, kDstate),
                       C = sequence(-1, 1, kDstate), out = sequence(0, 0, kDim);
  // Ranges of a trained model: A from -16 to -1, Δ around 0.01.
  const Random A(-16, -1, {kDim, kDstate}), D(-1, 1, {kDim}), delta_bias(-6, -3, {kDim});

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
  measure(state, state.range(1), selective_scan_fwd_workspace_size, selective_scan_fwd, args);
  state.SetLabel(layout_name(layout));
  // Updates of one state, h[b, d, n](t), a second.
  state.SetItemsProcessed(state.iterations() * kBatch * kSeqlen * kDim * kDstate);
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"layout", "threads"});
  for (const int64_t layout : {kSeqlenContiguous, kDimContiguous})
    for (const int threads : thread_counts()) benchmark->Args({layout, threads});
}

BENCHMARK(bench_selective_scan)->Apply(cases)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace ssmcore::bench
