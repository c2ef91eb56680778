// One decoding step of the scan: D 1536 and N 16, as one layer of mamba-130m, for 1 and 8 rows.
// States are kept with channels contiguous, as the models keep them.
#include "ssmcore/selective_state_update.h"
#include "support.h"

namespace ssmcore::bench {
namespace {

constexpr int64_t kDim = 1536, kDstate = 16;

void bench_selective_state_update(benchmark::State& state) {
  const int64_t batch = state.range(0);
  const Random states(-1, 1, {batch, kDstate, kDim}), x(-1, 1, {batch, kDim}),
      dt(-1, 1, {batch, kDim}), A(-16, -1, {kDstate, kDim}), B(-1, 1, {batch, kDstate}),
      C(-1, 1, {batch, kDstate}), D(-1, 1, {kDim}), z(-2, 2, {batch, kDim}),
      dt_bias(-6, -3, {kDim}), out(0, 0, {batch, kDim});
  SelectiveStateUpdateArgs args;
  args.state = states.view().transpose(1, 2);
  args.x = x.view();
  args.dt = dt.view();
  args.A = A.view().transpose(0, 1);
  args.B = B.view();
  args.C = C.view();
  args.D = D.view();
  args.z = z.view();
  args.dt_bias = dt_bias.view();
  args.dt_softplus = true;
  args.out = out.view();
  measure(state, state.range(1), selective_state_update_workspace_size, selective_state_update,
          args);
  // The states are read and written.
  state.SetBytesProcessed(state.iterations() * 2 * batch * kDim * kDstate * sizeof(float));
}

void cases(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"batch", "threads"});
  for (const int64_t batch : {1, 8})
    for (const int threads : thread_counts()) benchmark->Args({batch, threads});
}

BENCHMARK(bench_selective_state_update)->Apply(cases)->Unit(benchmark::kMicrosecond)->UseRealTime();

}  // namespace
}  // namespace ssmcore::bench
