// The selective scan in float64, for checking gradients and other kernels: the formulas of
// ssmcore/selective_scan.h, one channel at a time. Compiled once.
#include <algorithm>
#include <cmath>

#include "../scratch.h"
#include "../selective_scan_params.h"
#include "../thread_pool.h"

namespace ssmcore::cpu {
namespace {

template <int Rank, typename... Index>
double* at(const Strided<Rank>& tensor, Index... index) {
  static_assert(sizeof...(Index) == Rank);
  int64_t offset = 0;
  int dim = 0;
  ((offset += index * tensor.stride[dim++]), ...);
  return static_cast<double*>(tensor.data) + offset;
}

double softplus(double x) {
  return x > 20 ? x : std::log1p(std::exp(x));
}
double silu(double x) {
  return x / (1 + std::exp(-x));
}

// Channel (h, p) of row `row`; `state` holds dstate values.
void scan_channel(const SelectiveScanFwdParams& s, int64_t row, int64_t h, int64_t p,
                  double* state) {
  const auto boundary = [&](int64_t i) {
    return integer_at(s.cu_seqlens.data, DType::int32, i * s.cu_seqlens.stride[0]);
  };
  const bool packed = static_cast<bool>(s.cu_seqlens);
  const int64_t b = packed ? 0 : row, begin = packed ? boundary(row) : 0;
  const int64_t end = packed ? boundary(row + 1) : s.seqlen, g = h / (s.nheads / s.ngroups);
  const int64_t slot = s.state_indices ? integer_at(s.state_indices.data, DType::int32,
                                                    row * s.state_indices.stride[0])
                                       : row;
  int64_t chunk = 0;
  for (int64_t i = 0; packed && s.chunk_states && i < row; ++i)
    chunk += ceil_div(boundary(i + 1) - boundary(i), s.chunk_size);

  for (int64_t n = 0; n < s.dstate; ++n)
    state[n] = s.initial_state && slot >= 0 ? *at(s.initial_state, slot, h, p, n) : 0;
  double delta_sum = 0;
  for (int64_t t = begin; t < end; ++t) {
    const double u = *at(s.u, b, h, p, t);
    double delta = *at(s.delta, b, h, p, t) + (s.delta_bias ? *at(s.delta_bias, h, p) : 0);
    if (s.delta_softplus) delta = softplus(delta);
    delta_sum += delta;
    double y = 0;
    for (int64_t n = 0; n < s.dstate; ++n) {
      const double B = s.B ? *at(s.B, b, g, n, t) : *at(s.constant_B, h, p, n);
      const double C = s.C ? *at(s.C, b, g, n, t) : *at(s.constant_C, h, p, n);
      state[n] = std::exp(delta * *at(s.A, h, p, n)) * state[n] + delta * B * u;
      y += C * state[n];
    }
    if (s.D) y += *at(s.D, h, p) * u;
    if (s.z) y *= silu(*at(s.z, b, h, p, t));
    *at(s.out, b, h, p, t) = y;
    if (s.chunk_states && ((t + 1 - begin) % s.chunk_size == 0 || t + 1 == end)) {
      for (int64_t n = 0; n < s.dstate; ++n) *at(s.chunk_states, b, chunk, h, p, n) = state[n];
      ++chunk;
    }
  }
  if (s.last_state && slot >= 0)
    for (int64_t n = 0; n < s.dstate; ++n) *at(s.last_state, slot, h, p, n) = state[n];
  if (s.delta_sum) *at(s.delta_sum, row, h, p) = delta_sum;
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
