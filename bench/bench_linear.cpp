// Matrix products of mamba-130m: in_proj (768 to 3072) for a prompt of 512 tokens, and the head
// (768 to 50,280) for 1 and 8 rows, which stream its weights from memory. x is float32 or bfloat16,
// the weights' dtype too. And the gradients of x and of the weight of in_proj, float32.
#include "ssmcore/linear.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

constexpr int64_t kInFeatures = 768;

void bench_linear(benchmark::State& state) {
  const int64_t rows = state.range(0), out_features = state.range(1);
  const DType x_dtype = static_cast<DType>(state.range(2));
  const DType weight_dtype = static_cast<DType>(state.range(3));
  const Random x(-1, 1, {rows, kInFeatures}, x_dtype),
      weight(-1, 1, {out_features, kInFeatures}, weight_dtype),
      out(0, 0, {rows, out_features}, x_dtype);
  LinearArgs args;
  args.x = x.view();
  args.weight = weight.view();
  args.out = out.view();
  measure(state, state.range(4), linear_workspace_size, linear, args);
  state.SetLabel(std::string("x ") + dtype_name(x_dtype) + ", weight " + dtype_name(weight_dtype));
  state.counters["FLOP/s"] = benchmark::Counter(
      2.0 * rows * kInFeatures * out_features * state.iterations(), benchmark::Counter::kIsRate);
  state.SetBytesProcessed(state.iterations() * out_features * kInFeatures *
                          dtype_size(weight_dtype));
}

// which: 0 dx, 1 dweight.
void bench_linear_bwd(benchmark::State& state) {
  constexpr int64_t kRows = 512, kOutFeatures = 3072;
  const Random x(-1, 1, {kRows, kInFeatures}), weight(-1, 1, {kOutFeatures, kInFeatures}),
      dout(-1, 1, {kRows, kOutFeatures}), dx(0, 0, {kRows, kInFeatures}),
      dweight(0, 0, {kOutFeatures, kInFeatures});
  LinearBwdArgs args;
  args.x = x.view();
  args.weight = weight.view();
  args.dout = dout.view();
  const bool of_weight = state.range(0) == 1;
  (of_weight ? args.dweight : args.dx).tensor = of_weight ? dweight.view() : dx.view();
  measure(state, state.range(1), linear_bwd_workspace_size, linear_bwd, args);
  state.SetLabel(of_weight ? "dweight" : "dx");
  state.counters["FLOP/s"] = benchmark::Counter(
      2.0 * kRows * kInFeatures * kOutFeatures * state.iterations(), benchmark::Counter::kIsRate);
}

void bwd_cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"which", "threads"});
  for (const int64_t which : {0, 1})
    for (const int threads : thread_counts()) benchmark->Args({which, threads});
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"rows", "outputs", "x", "weight", "threads"});
  const int64_t f32 = static_cast<int64_t>(DType::float32);
  const int64_t bf16 = static_cast<int64_t>(DType::bfloat16);
  for (const auto& [rows, outputs] :
       {std::pair<int64_t, int64_t>{512, 3072}, {1, 50280}, {8, 50280}})
    for (const auto& [x, weight] : {std::pair{f32, f32}, {f32, bf16}, {bf16, bf16}})
      for (const int threads : thread_counts())
        benchmark->Args({rows, outputs, x, weight, threads});
}

BENCHMARK(bench_linear)->Apply(cases)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(bench_linear_bwd)->Apply(bwd_cases)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace ssmcore::bench
