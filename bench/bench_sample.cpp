// Choosing a token among mamba-130m's 50,280, greedily and by each of the filters.
#include "ssmcore/sample.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

constexpr int64_t kVocabSize = 50280;

enum Method : int64_t { kGreedy, kPlain, kTopK, kTopP };

void bench_sample(benchmark::State& state) {
  const Random logits(-8, 8, {1, kVocabSize});
  float temperature = state.range(0) == kGreedy ? 0.0f : 1.0f, top_p = 0.9f;
  int32_t top_k = 50;
  int64_t token = 0;
  SampleArgs args;
  args.logits = logits.view();
  args.temperature = TensorView(&temperature, DType::float32, {1});
  if (state.range(0) == kTopK) args.top_k = TensorView(&top_k, DType::int32, {1});
  if (state.range(0) == kTopP) args.top_p = TensorView(&top_p, DType::float32, {1});
  args.out = TensorView(&token, DType::int64, {1});
  measure(state, 1, sample_workspace_size, sample, args);
  constexpr const char* kNames[] = {"greedy", "no filter", "top-k 50", "top-p 0.9"};
  state.SetLabel(kNames[state.range(0)]);
}

BENCHMARK(bench_sample)
    ->ArgName("method")
    ->DenseRange(kGreedy, kTopP)
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

}  // namespace
}  // namespace ssmcore::bench
