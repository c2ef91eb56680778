// The selective scan in float64, for checking gradients and other kernels: the formulas of
// ssmcore/selective_scan.h, one channel at a time. Compiled once.
#include <cmath>

#include "../scratch.h"
#include "../thread_pool.h"
#include "scan_float64.h"

namespace ssmcore::cpu {
namespace {

using namespace float64;

// Channel (h, p) of row `row`; `state` holds dstate values.
void scan_channel(const SelectiveScanFwdParams& s, int64_t row, int64_t h, int64_t p,
                  double* state) {
  const Row r(s, row);
  const int64_t b = r.batch, g = h / (s.nheads / s.ngroups);
  int64_t chunk = 0;
  for (int64_t i = 0; s.cu_seqlens && s.chunk_states && i < row; ++i)
    chunk += ceil_div(Row(s, i).end - Row(s, i).begin, s.chunk_size);

  for (int64_t n = 0; n < s.dstate; ++n)
    state[n] = s.initial_state && r.slot >= 0 ? at(s.initial_state, r.slot, h, p, n) : 0;
  double delta_sum = 0;
  for (int64_t t = r.begin; t < r.end; ++t) {
    const double u = at(s.u, b, h, p, t);
    double delta = at(s.delta, b, h, p, t) + (s.delta_bias ? at(s.delta_bias, h, p) : 0);
    if (s.delta_softplus) delta = softplus(delta);
    delta_sum += delta;
    double y = 0;
    for (int64_t n = 0; n < s.dstate; ++n) {
      const double B = s.B ? at(s.B, b, g, n, t) : at(s.constant_B, h, p, n);
      const double C = s.C ? at(s.C, b, g, n, t) : at(s.constant_C, h, p, n);
      state[n] = std::exp(delta * at(s.A, h, p, n)) * state[n] + delta * B * u;
      y += C * state[n];
    }
    if (s.D) y += at(s.D, h, p) * u;
    if (s.z) y *= silu(at(s.z, b, h, p, t));
    at(s.out, b, h, p, t) = y;
    if (s.chunk_states && ((t + 1 - r.begin) % s.chunk_size == 0 || t + 1 == r.end)) {
      for (int64_t n = 0; n < s.dstate; ++n) at(s.chunk_states, b, chunk, h, p, n) = state[n];
      ++chunk;
    }
  }
  if (s.last_state && r.slot >= 0)
    for (int64_t n = 0; n < s.dstate; ++n) at(s.last_state, r.slot, h, p, n) = state[n];
  if (s.delta_sum) at(s.delta_sum, row, h, p) = delta_sum;
}

size_t state_bytes(const SelectiveScanFwdParams& params) {
  Scratch scratch = Scratch::nowhere();
  scratch.bytes(Scratch::product(static_cast<size_t>(params.dstate), sizeof(double)));
  return scratch.used();
}

}  // namespace

size_t selective_scan_fwd_float64_workspace_size(const SelectiveScanFwdParams& params,
                                                 const Context& context) {
  return Scratch::product(state_bytes(params), static_cast<size_t>(context.num_threads()));
}

void selective_scan_fwd_float64(const SelectiveScanFwdParams& params, const Exec& exec) {
  const size_t bytes = state_bytes(params);
  const int64_t channels = params.nheads * params.headdim;
  exec.context.thread_pool().parallel_for(
      params.rows * channels, workers_with_scratch(exec, bytes, INT64_MAX - 1),
      [&](int64_t task, int worker) {
        const int64_t channel = task % channels;
        auto* state =
            reinterpret_cast<double*>(static_cast<char*>(exec.workspace) + worker * bytes);
        scan_channel(params, task / channels, channel / params.headdim, channel % params.headdim,
                     state);
      });
}

}  // namespace ssmcore::cpu
