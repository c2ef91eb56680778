// The loss and its gradient, 512 rows of mamba-130m's vocabulary of 50,280, float32.
#include <cstdint>
#include <vector>

#include "ssmcore/cross_entropy.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

constexpr int64_t kRows = 512, kVocabSize = 50280;

struct Loss {
  Random logits{-10, 10, {kRows, kVocabSize}}, lse{12, 13, {kRows}}, mean_loss{0, 1, {1}};
  std::vector<int64_t> ids;

  Loss() {
    for (int64_t row = 0; row < kRows; ++row) ids.push_back(row * 7919 % kVocabSize);
  }
  TensorView targets() { return TensorView(ids.data(), DType::int64, {kRows}); }
};

void finish(benchmark::State& state) {
  state.SetItemsProcessed(state.iterations() * kRows * kVocabSize);
}

void bench_cross_entropy(benchmark::State& state) {
  Loss loss;
  CrossEntropyFwdArgs args;
  args.logits = loss.logits.view();
  args.targets = loss.targets();
  args.mean_loss = loss.mean_loss.view();
  args.lse = loss.lse.view();
  measure(state, state.range(0), cross_entropy_fwd_workspace_size, cross_entropy_fwd, args);
  finish(state);
}

void bench_cross_entropy_bwd(benchmark::State& state) {
  Loss loss;
  const Random dlogits(0, 0, {kRows, kVocabSize});
  CrossEntropyBwdArgs args;
  args.logits = loss.logits.view();
  args.targets = loss.targets();
  args.lse = loss.lse.view();
  args.dmean_loss = loss.mean_loss.view();
  args.dlogits.tensor = dlogits.view();
  measure(state, state.range(0), cross_entropy_bwd_workspace_size, cross_entropy_bwd, args);
  finish(state);
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgName("threads");
  for (const int threads : thread_counts()) benchmark->Arg(threads);
}

BENCHMARK(bench_cross_entropy)->Apply(cases)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(bench_cross_entropy_bwd)->Apply(cases)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace ssmcore::bench
