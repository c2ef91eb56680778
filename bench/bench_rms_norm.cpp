// The norm with residual addition and its gradients, 512 rows of mamba-130m's d_model 768, float32.
#include "ssmcore/rms_norm.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

constexpr int64_t kRows = 512, kDim = 768;

void bench_rms_norm(benchmark::State& state) {
  const Random x(-1, 1, {kRows, kDim}), residual(-1, 1, {kRows, kDim}), weight(0.5, 2, {kDim}),
      residual_out(0, 0, {kRows, kDim}), out(0, 0, {kRows, kDim});
  RmsNormFwdArgs args;
  args.x = x.view();
  args.residual = residual.view();
  args.residual_out = residual_out.view();
  args.weight = weight.view();
  args.out = out.view();
  measure(state, state.range(0), rms_norm_fwd_workspace_size, rms_norm_fwd, args);
  state.SetBytesProcessed(state.iterations() * 4 * kRows * kDim * sizeof(float));
}

void bench_rms_norm_bwd(benchmark::State& state) {
  const Random r(-1, 1, {kRows, kDim}), weight(0.5, 2, {kDim}), dout(-1, 1, {kRows, kDim}),
      dresidual(-1, 1, {kRows, kDim}), dx(0, 0, {kRows, kDim}), dweight(0, 0, {kDim});
  RmsNormBwdArgs args;
  args.x = r.view();
  args.weight = weight.view();
  args.dout = dout.view();
  args.dresidual_out = dresidual.view();
  args.dx.tensor = dx.view();
  args.dweight.tensor = dweight.view();
  measure(state, state.range(0), rms_norm_bwd_workspace_size, rms_norm_bwd, args);
  state.SetBytesProcessed(state.iterations() * 4 * kRows * kDim * sizeof(float));
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgName("threads");
  for (const int threads : thread_counts()) benchmark->Arg(threads);
}

BENCHMARK(bench_rms_norm)->Apply(cases)->Unit(benchmark::kMicrosecond)->UseRealTime();
BENCHMARK(bench_rms_norm_bwd)->Apply(cases)->Unit(benchmark::kMicrosecond)->UseRealTime();

}  // namespace
}  // namespace ssmcore::bench
