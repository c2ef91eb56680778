// A whole model: a prompt of 512 tokens, and one token for 1 and 8 sequences. The folder is
// SSMCORE_BENCH_MODEL, by default the bundled model's.
#include <cstdlib>

#include "ssmcore/language_model.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

void bench_language_model(benchmark::State& state) {
  const int64_t batch = state.range(0), seqlen = state.range(1);
  const Context context({}, with_threads(state.range(2)));
  const char* folder = std::getenv("SSMCORE_BENCH_MODEL");
  const LanguageModel model(open_checkpoint(folder ? folder : SSMCORE_BUNDLED_MODEL), context);
  ModelState states = model.new_state(batch);
  std::vector<int32_t> token_ids(static_cast<size_t>(batch * seqlen), 97);
  std::vector<float> logits(static_cast<size_t>(batch * model.config().vocab_size));
  const Buffer workspace(context.allocator(), model.workspace_size(batch, seqlen, context),
                         "a benchmark");
  LanguageModelFwdArgs args;
  args.token_ids = TensorView(token_ids.data(), DType::int32, {batch, seqlen});
  args.state = &states;
  args.logits = TensorView(logits.data(), DType::float32, {batch, model.config().vocab_size});
  for ([[maybe_unused]] auto _ : state)
    model.forward(args, {context, nullptr, workspace.data(), workspace.bytes()});
  state.SetItemsProcessed(state.iterations() * batch * seqlen);  // tokens
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"batch", "seqlen", "threads"});
  for (const auto& [batch, seqlen] : {std::pair<int64_t, int64_t>{1, 512}, {1, 1}, {8, 1}})
    for (const int threads : thread_counts()) benchmark->Args({batch, seqlen, threads});
}

BENCHMARK(bench_language_model)->Apply(cases)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace ssmcore::bench
