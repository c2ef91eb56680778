// The backward of the selective scan in float64, for checking gradients and other kernels: the
// formulas of ssmcore/selective_scan.h, one channel after the other. Compiled once.
#include <cmath>

#include "../scratch.h"
#include "../selective_scan_params.h"
#include "scan_float64.h"

namespace ssmcore::cpu {
namespace {

using namespace float64;

// Sets every element to 0, or leaves what will be added to.
template <int Rank>
void begin(const StridedGradient<Rank>& gradient, const int64_t (&shape)[Rank]) {
  if (!gradient || gradient.accumulate) return;
  int64_t index[Rank] = {};
  for (int dim = 0; dim >= 0;) {
    int64_t offset = 0;
    for (int i = 0; i < Rank; ++i) offset += index[i] * gradient.stride[i];
    static_cast<double*>(gradient.data)[offset] = 0;
    for (dim = Rank - 1; dim >= 0 && ++index[dim] == shape[dim]; --dim) index[dim] = 0;
  }
}

template <int Rank, typename... Index>
void add(const StridedGradient<Rank>& gradient, double value, Index... index) {
  if (gradient) at(static_cast<const Strided<Rank>&>(gradient), index...) += value;
}

// Channel (h, p) of one row. `states` holds (steps + 1, dstate) values, `dstate` dstate.
void run_channel(const SelectiveScanBwdParams& b, int64_t row, int64_t h, int64_t p, double* states,
                 double* dstate) {
  const SelectiveScanFwdParams& s = b.fwd;
  const Row r(s, row);
  const int64_t N = s.dstate, g = h / (s.nheads / s.ngroups);
  const int64_t g_B = b.ngroups_B == 1 ? 0 : g, g_C = b.ngroups_C == 1 ? 0 : g;
  const bool has_slot = r.slot >= 0;
  const auto A = [&](int64_t n) { return at(s.A, h, p, n); };
  const auto B = [&](int64_t n, int64_t t) {
    return s.B ? at(s.B, r.batch, g, n, t) : at(s.constant_B, h, p, n);
  };
  const auto C = [&](int64_t n, int64_t t) {
    return s.C ? at(s.C, r.batch, g, n, t) : at(s.constant_C, h, p, n);
  };
  const auto raw_delta = [&](int64_t t) {
    return at(s.delta, r.batch, h, p, t) + (s.delta_bias ? at(s.delta_bias, h, p) : 0);
  };
  const auto delta = [&](int64_t t) {
    return s.delta_softplus ? softplus(raw_delta(t)) : raw_delta(t);
  };
  const auto u = [&](int64_t t) { return at(s.u, r.batch, h, p, t); };
  const double D = s.D ? at(s.D, h, p) : 0;

  for (int64_t n = 0; n < N; ++n) {
    states[n] = s.initial_state && has_slot ? at(s.initial_state, r.slot, h, p, n) : 0;
    dstate[n] = b.dlast_state && has_slot ? at(b.dlast_state, r.slot, h, p, n) : 0;
  }
  for (int64_t t = r.begin; t < r.end; ++t) {
    const double* before = states + (t - r.begin) * N;
    for (int64_t n = 0; n < N; ++n)
      states[(t - r.begin + 1) * N + n] =
          std::exp(delta(t) * A(n)) * before[n] + delta(t) * B(n, t) * u(t);
  }

  for (int64_t t = r.end; t-- > r.begin;) {
    const double* before = states + (t - r.begin) * N;
    const double* after = before + N;
    const double dout = at(b.dout, r.batch, h, p, t), dt = delta(t);
    double dy = dout;
    if (s.z) {
      const double z = at(s.z, r.batch, h, p, t);
      double y = D * u(t);
      for (int64_t n = 0; n < N; ++n) y += C(n, t) * after[n];
      add(b.dz, dout * y * silu_slope(z), r.batch, h, p, t);
      dy *= silu(z);
    }
    double dx = 0, ddelta = 0;
    for (int64_t n = 0; n < N; ++n) {
      dstate[n] += C(n, t) * dy;
      add(b.dC, dy * after[n], r.batch, g_C, n, t);
      add(b.constant_dC, dy * after[n], h, p, n);
      add(b.dB, dstate[n] * dt * u(t), r.batch, g_B, n, t);
      add(b.constant_dB, dstate[n] * dt * u(t), h, p, n);
      dx += dstate[n] * B(n, t);
      dstate[n] *= std::exp(dt * A(n));
      ddelta += dstate[n] * before[n] * A(n);
      add(b.dA, dstate[n] * before[n] * dt, h, p, n);
    }
    ddelta += dx * u(t);
    if (s.delta_softplus && raw_delta(t) <= 20) ddelta *= sigmoid(raw_delta(t));
    add(b.du, dx * dt + D * dy, r.batch, h, p, t);
    add(b.dD, dy * u(t), h, p);
    add(b.ddelta, ddelta, r.batch, h, p, t);
    add(b.ddelta_bias, ddelta, h, p);
  }
  if (has_slot)
    for (int64_t n = 0; n < N; ++n) put(b.dinitial_state, dstate[n], r.slot, h, p, n);
}

size_t states_bytes(const SelectiveScanFwdParams& s) {
  return Scratch::product(
      Scratch::product(static_cast<size_t>(s.seqlen) + 2, static_cast<size_t>(s.dstate)),
      sizeof(double));
}

}  // namespace

size_t selective_scan_bwd_float64_workspace_size(const SelectiveScanBwdParams& params) {
  return states_bytes(params.fwd);
}

// In one thread: the sums over rows and channels go straight to the gradients.
void selective_scan_bwd_float64(const SelectiveScanBwdParams& params, const Exec& exec) {
  const SelectiveScanFwdParams& s = params.fwd;
  const int64_t batch = s.cu_seqlens ? 1 : s.rows;
  for (const auto* gradient : {&params.du, &params.ddelta, &params.dz})
    begin(*gradient, {batch, s.nheads, s.headdim, s.seqlen});
  for (const auto* gradient : {&params.dA, &params.constant_dB, &params.constant_dC})
    begin(*gradient, {s.nheads, s.headdim, s.dstate});
  begin(params.dB, {batch, params.ngroups_B, s.dstate, s.seqlen});
  begin(params.dC, {batch, params.ngroups_C, s.dstate, s.seqlen});
  for (const auto* gradient : {&params.dD, &params.ddelta_bias})
    begin(*gradient, {s.nheads, s.headdim});

  double* dstate = static_cast<double*>(exec.workspace);
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t h = 0; h < s.nheads; ++h)
      for (int64_t p = 0; p < s.headdim; ++p)
        run_channel(params, row, h, p, dstate + s.dstate, dstate);
}

}  // namespace ssmcore::cpu
