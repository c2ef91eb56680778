// The selective scan at the size of one layer of mamba-130m: B 1, L 512, D 1536, N 16, float32,
// with D, z, delta_bias and softplus.
#include <benchmark/benchmark.h>

#include <random>
#include <set>
#include <string>
#include <vector>

#include "ssmcore/selective_scan.h"

using namespace ssmcore;

namespace {

constexpr int64_t kBatch = 1, kSeqlen = 512, kDim = 1536, kDstate = 16;

enum Layout : int64_t { kSeqlenContiguous, kDimContiguous };

// Random numbers, viewed as a tensor; the memory lives as long as this.
class Random {
 public:
  Random(float least, float most, std::initializer_list<int64_t> shape)
      : view_(nullptr, DType::float32, shape), memory_(view_.numel()) {
    static std::mt19937 generator(1);
    std::uniform_real_distribution<float> distribution(least, most);
    for (float& value : memory_) value = distribution(generator);
    view_.data = memory_.data();
  }
  const TensorView& view() const { return view_; }

 private:
  TensorView view_;
  std::vector<float> memory_;
};

// (batch, rows, seqlen), in the memory order of the layout.
Random random_sequence(Layout layout, float least, float most, int64_t rows) {
  return layout == kSeqlenContiguous ? Random(least, most, {kBatch, rows, kSeqlen})
                                     : Random(least, most, {kBatch, kSeqlen, rows});
}

void bench_selective_scan(benchmark::State& state) {
  const Layout layout = static_cast<Layout>(state.range(0));
  ContextOptions options;
  options.num_threads = static_cast<int>(state.range(1));
  const Context context({}, options);

  const Random u = random_sequence(layout, -1, 1, kDim), z = random_sequence(layout, -2, 2, kDim),
               delta = random_sequence(layout, -1, 1, kDim),
               B = random_sequence(layout, -1, 1, kDstate),
               C = random_sequence(layout, -1, 1, kDstate),
               out = random_sequence(layout, 0, 0, kDim);
  // Ranges of a trained model: A from -16 to -1, Δ around 0.01.
  const Random A(-16, -1, {kDim, kDstate}), D(-1, 1, {kDim}), delta_bias(-6, -3, {kDim});

  const auto sequence = [&](const Random& tensor) {
    return layout == kSeqlenContiguous ? tensor.view() : tensor.view().transpose(1, 2);
  };
  SelectiveScanFwdArgs args;
  args.u = sequence(u);
  args.delta = sequence(delta);
  args.A = A.view();
  args.B = sequence(B);
  args.C = sequence(C);
  args.D = D.view();
  args.z = sequence(z);
  args.delta_bias = delta_bias.view();
  args.delta_softplus = true;
  args.out = sequence(out);
  const Buffer workspace(context.allocator(), selective_scan_fwd_workspace_size(args, context),
                         "a benchmark");
  const Exec exec{context, nullptr, workspace.data(), workspace.bytes()};

  for ([[maybe_unused]] auto _ : state) {
    selective_scan_fwd(args, exec);
    benchmark::ClobberMemory();
  }
  state.SetLabel(std::string(isa_name(context.isa())) +
                 (layout == kSeqlenContiguous ? ", L contiguous" : ", D contiguous"));
  // Updates of one state, h[b, d, n](t), a second.
  state.SetItemsProcessed(state.iterations() * kBatch * kSeqlen * kDim * kDstate);
}

// One thread and every core, in both layouts.
void cases(benchmark::internal::Benchmark* benchmark) {
  const std::set<int> thread_counts = {1, Context().num_threads()};
  benchmark->ArgNames({"layout", "threads"});
  for (const int64_t layout : {kSeqlenContiguous, kDimContiguous})
    for (const int threads : thread_counts) benchmark->Args({layout, threads});
}

BENCHMARK(bench_selective_scan)->Apply(cases)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
