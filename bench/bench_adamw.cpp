// One step of AdamW, clipped, on as many parameters as the bundled model has, float32.
#include <cstdint>

#include "ssmcore/adamw.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

constexpr int64_t kNumel = 3569920;

void finish(benchmark::State& state) {
  state.SetItemsProcessed(state.iterations() * kNumel);
}

void bench_adamw(benchmark::State& state) {
  const Random parameter(-1, 1, {kNumel}), gradient(-1, 1, {kNumel}), exp_avg(-1, 1, {kNumel}),
      exp_avg_sq(0, 1, {kNumel});
  double sum = 1;
  AdamWArgs args;
  args.parameter = parameter.view();
  args.gradient = gradient.view();
  args.exp_avg = exp_avg.view();
  args.exp_avg_sq = exp_avg_sq.view();
  args.sum_of_squares = TensorView(&sum, DType::float64, {1});
  args.max_norm = 0.5;
  const auto no_workspace = [](const AdamWArgs&, const Context&) -> size_t { return 0; };
  measure<AdamWArgs>(state, state.range(0), no_workspace, adamw, args);
  finish(state);
}

void bench_sum_of_squares(benchmark::State& state) {
  const Random x(-1, 1, {kNumel});
  double sum = 0;
  const SumOfSquaresArgs args{x.view(), TensorView(&sum, DType::float64, {1})};
  measure(state, state.range(0), sum_of_squares_workspace_size, sum_of_squares, args);
  finish(state);
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgName("threads");
  for (const int threads : thread_counts()) benchmark->Arg(threads);
}

BENCHMARK(bench_adamw)->Apply(cases)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(bench_sum_of_squares)->Apply(cases)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace ssmcore::bench
