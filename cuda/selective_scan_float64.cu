// The selective scan in float64, for checking gradients and other kernels: the formulas of
// ssmcore/selective_scan.h, a warp for each channel, its lanes sharing the states.
#include <string>

#include "device/math.cuh"
#include "launch.h"
#include "scan_row.cuh"
#include "selective_scan.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {
namespace {

constexpr int kWarps = 4, kLanes = 32;
constexpr int kStates = 8;  // of a lane: up to 256 of a channel

template <int Rank, typename... Index>
__device__ double* at(const Strided<Rank>& tensor, Index... index) {
  static_assert(sizeof...(Index) == Rank);
  int64_t offset = 0;
  int dim = 0;
  ((offset += index * tensor.stride[dim++]), ...);
  return static_cast<double*>(tensor.data) + offset;
}

__device__ double sum_of_lanes(double v) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    v += __shfl_xor_sync(0xffffffff, v, distance);
  return v;
}

// The row's first entry in chunk_states: packed rows follow one another.
__device__ int64_t first_chunk(const SelectiveScanFwdParams& s, int64_t row) {
  if (!s.chunk_states.data || !s.cu_seqlens.data) return 0;
  int64_t chunks = 0;
  for (int64_t i = 0; i < row; ++i) {
    const int64_t length = index_at(s.cu_seqlens, i + 1) - index_at(s.cu_seqlens, i);
    if (length > 0) chunks += (length + s.chunk_size - 1) / s.chunk_size;
  }
  return chunks;
}

__global__ void __launch_bounds__(kWarps* kLanes)
    selective_scan_fwd_float64_kernel(SelectiveScanFwdParams s, uint32_t* faults) {
  const int lane = threadIdx.x % kLanes;
  const int64_t task = int64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const int64_t channels = s.nheads * s.headdim;
  if (task >= s.rows * channels) return;
  const int64_t row = task / channels, h = task % channels / s.headdim, p = task % s.headdim;
  const int64_t g = h / (s.nheads / s.ngroups);
  const ScanRow is = scan_row(s, row, faults);
  int64_t chunk = first_chunk(s, row);

  double state[kStates], A[kStates];
#pragma unroll
  for (int k = 0; k < kStates; ++k) {
    const int64_t n = lane + k * kLanes;
    const bool exists = n < s.dstate;
    A[k] = exists ? *at(s.A, h, p, n) : 0;
    state[k] =
        exists && s.initial_state.data && is.slot >= 0 ? *at(s.initial_state, is.slot, h, p, n) : 0;
  }
  double delta_sum = 0;
  for (int64_t t = is.begin; t < is.end; ++t) {
    const double u = *at(s.u, is.batch, h, p, t);
    double delta = *at(s.delta, is.batch, h, p, t);
    if (s.delta_bias.data) delta += *at(s.delta_bias, h, p);
    if (s.delta_softplus) delta = softplus(delta);
    delta_sum += delta;
    double y = 0;
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const int64_t n = lane + k * kLanes;
      if (n >= s.dstate) continue;
      const double B = s.B.data ? *at(s.B, is.batch, g, n, t) : *at(s.constant_B, h, p, n);
      const double C = s.C.data ? *at(s.C, is.batch, g, n, t) : *at(s.constant_C, h, p, n);
      state[k] = exp(delta * A[k]) * state[k] + delta * B * u;
      y += C * state[k];
    }
    y = sum_of_lanes(y);
    if (s.D.data) y += *at(s.D, h, p) * u;
    if (s.z.data) y *= silu(*at(s.z, is.batch, h, p, t));
    if (lane == 0) *at(s.out, is.batch, h, p, t) = y;
    const bool ends_chunk =
        s.chunk_states.data && ((t + 1 - is.begin) % s.chunk_size == 0 || t + 1 == is.end);
    if (!ends_chunk || chunk >= s.chunks) continue;
#pragma unroll
    for (int k = 0; k < kStates; ++k)
      if (lane + k * kLanes < s.dstate)
        *at(s.chunk_states, is.batch, chunk, h, p, int64_t(lane + k * kLanes)) = state[k];
    ++chunk;
  }
#pragma unroll
  for (int k = 0; k < kStates; ++k)
    if (s.last_state.data && is.slot >= 0 && lane + k * kLanes < s.dstate)
      *at(s.last_state, is.slot, h, p, int64_t(lane + k * kLanes)) = state[k];
  if (s.delta_sum.data && lane == 0) *at(s.delta_sum, row, h, p) = delta_sum;
}

}  // namespace

void selective_scan_fwd_float64(const SelectiveScanFwdParams& p, const Exec& exec) {
  if (p.dstate > kStates * kLanes)
    throw Error(ErrorCode::unsupported, "selective_scan: A has dstate " + std::to_string(p.dstate) +
                                            ", in float64 a GPU takes up to 256");
  const int64_t tasks = p.rows * p.nheads * p.headdim;
  launch_kernel("selective_scan", selective_scan_fwd_float64_kernel,
                {blocks_for(tasks, kWarps), kWarps * kLanes}, exec, p,
                exec.context.cuda().faults());
}

}  // namespace ssmcore::cuda
