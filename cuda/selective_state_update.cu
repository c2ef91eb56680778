// One step of the selective scan, for decoding: a pass over the states at the memory's speed. A
// warp takes 32 channels of one head, 4 lanes a channel, 4 neighbouring states a lane at a time.
#include <type_traits>

#include "device/state.cuh"
#include "launch.h"
#include "scan_row.cuh"
#include "selective_scan.h"

namespace ssmcore::cuda {
namespace {

constexpr int kLanes = 4;                // of a channel
constexpr int kQuad = 4;                 // neighbouring states
constexpr int kBlockN = kLanes * kQuad;  // states of a channel that a warp takes at a time
constexpr int kBlockD = 32;              // channels of a warp
constexpr int kPasses = kLanes;          // over 8 channels each
constexpr int kMaxWarps = 4;

using Quad = Vector<float, kQuad>;

template <typename T>
__device__ __forceinline__ Quad load_quad(const T* from) {
  const auto values = load_vector<kQuad>(from);
  Quad quad;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) quad.value[k] = to_float(values.value[k]);
  return quad;
}

// Of each lane's sums for 4 channels, the total over the 4 lanes for the one that the lane keeps.
__device__ __forceinline__ float total_over_lanes(const float (&sums)[kPasses], int lane) {
  const bool high = lane & 2, odd = lane & 1;
  float kept[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float sent = high ? sums[k] : sums[k + 2];
    kept[k] = (high ? sums[k + 2] : sums[k]) + __shfl_xor_sync(~0u, sent, 2);
  }
  const float sent = odd ? kept[0] : kept[1];
  return (odd ? kept[1] : kept[0]) + __shfl_xor_sync(~0u, sent, 1);
}

template <typename T, int kRows>
__global__ void __launch_bounds__(32 * kMaxWarps)
    selective_state_update_fwd_kernel(SelectiveScanFwdParams p, unsigned blocks_per_row,
                                      unsigned tiles_per_head, uint32_t* faults) {
  const int lane = static_cast<int>(threadIdx.x) % 32, quad = lane % kLanes;
  const unsigned tile = blockIdx.x % blocks_per_row * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / blocks_per_row) * kRows;
  const int64_t head = tile / tiles_per_head, first_d = tile % tiles_per_head * kBlockD;
  if (head >= p.nheads) return;
  const int channels = static_cast<int>(min(p.headdim - first_d, static_cast<int64_t>(kBlockD)));
  // Where it works on states a lane has channels shared + 8 i, with its neighbours; everything else
  // it does for one channel of its own, the i of which is `quad`.
  const int shared = lane / kLanes, own = shared + 8 * quad;
  const bool is_own = own < channels;
  const int64_t own_d = first_d + own, shared_d = first_d + shared;

  int64_t slot[kRows];
  float u[kRows] = {}, delta[kRows] = {}, z[kRows] = {}, sums[kRows][kPasses] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first_row + r;
    slot[r] = -1;
    if (row >= p.rows) continue;
    slot[r] = scan_slot(p, row, faults);
    const auto activation = [&](const Strided<4>& tensor) {
      return to_float(static_cast<const T*>(
          tensor
              .data)[row * tensor.stride[0] + head * tensor.stride[1] + own_d * tensor.stride[2]]);
    };
    if (!is_own) continue;
    u[r] = activation(p.u);
    delta[r] = activation(p.delta);
    if (p.z.data != nullptr) z[r] = activation(p.z);
  }
  const auto parameter = [&](const Strided<2>& tensor) {
    return is_own && tensor.data != nullptr
               ? static_cast<const float*>(
                     tensor.data)[head * tensor.stride[0] + own_d * tensor.stride[1]]
               : 0.0f;
  };
  const float bias = parameter(p.delta_bias), D = parameter(p.D);

  const int64_t group = head / (p.nheads / p.ngroups);
  const int dstate = static_cast<int>(p.dstate);
  for (int n = quad * kQuad; n - quad * kQuad < dstate; n += kBlockN) {
    const bool is_state = n < dstate;
    Quad A[kPasses] = {}, h[kRows][kPasses] = {}, B[kRows] = {}, C[kRows] = {};
    const auto state_at = [&](const Strided<4>& state, int r, int i) {
      return static_cast<float*>(state.data) + slot[r] * state.stride[0] + head * state.stride[1] +
             (shared_d + 8 * i) * state.stride[2] + n;
    };
    const auto has_state = [&](const Strided<4>& state, int r, int i) {
      return is_state && shared + 8 * i < channels && slot[r] >= 0 && state.data != nullptr;
    };
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int i = 0; i < kPasses; ++i)
        if (has_state(p.initial_state, r, i))
          h[r][i] = load_vector<kQuad>(state_at(p.initial_state, r, i));
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (!is_state || shared + 8 * i >= channels) continue;
      const float* from = static_cast<const float*>(p.A.data) + head * p.A.stride[0] +
                          (shared_d + 8 * i) * p.A.stride[1];
      if (p.A.stride[2] == 1)
        A[i] = load_vector<kQuad>(from + n);
      else  // one number for all states
        A[i] = {*from, *from, *from, *from};
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first_row + r;
      if (!is_state || row >= p.rows) continue;
      const auto coefficients = [&](const Strided<4>& tensor) {
        return load_quad(static_cast<const T*>(tensor.data) + row * tensor.stride[0] +
                         group * tensor.stride[1] + n);
      };
      B[r] = coefficients(p.B);
      C[r] = coefficients(p.C);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float dt_own = delta[r] + bias;
      if (p.delta_softplus) dt_own = softplus(dt_own);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const float dt = __shfl_sync(~0u, dt_own, i, kLanes);
        const float x = dt * __shfl_sync(~0u, u[r], i, kLanes);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
          float& state = h[r][i].value[k];
          state = advance(decay(dt, scaled_rate(A[i].value[k])), state, x, B[r].value[k]);
          sums[r][i] += C[r].value[k] * state;
        }
        if (has_state(p.last_state, r, i)) store_vector(state_at(p.last_state, r, i), h[r][i]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float y = total_over_lanes(sums[r], lane) + D * u[r];
    if (p.z.data != nullptr) y *= silu(z[r]);
    const int64_t row = first_row + r;
    if (is_own && row < p.rows)
      static_cast<T*>(
          p.out.data)[row * p.out.stride[0] + head * p.out.stride[1] + own_d * p.out.stride[2]] =
          from_float<T>(y);
  }
}

// Whether dimension `dim`, of states, can be taken four at a time.
template <int kRank>
bool in_quads(const Strided<kRank>& tensor, int dim, size_t size) {
  if (!tensor) return true;
  bool fits = tensor.stride[dim] == 1 && is_aligned(tensor.data, kQuad * size);
  for (int i = 0; i < dim; ++i) fits = fits && tensor.stride[i] % kQuad == 0;
  return fits;
}

}  // namespace

bool is_state_update(const SelectiveScanFwdParams& p) {
  return p.seqlen == 1 && !p.complex && p.B && p.C && !p.cu_seqlens && !p.chunk_states &&
         !p.delta_sum && p.dstate % kQuad == 0 &&
         (in_quads(p.A, 2, sizeof(float)) || p.A.stride[2] == 0) &&
         in_quads(p.B, 2, dtype_size(p.dtype)) && in_quads(p.C, 2, dtype_size(p.dtype)) &&
         in_quads(p.initial_state, 3, sizeof(float)) && in_quads(p.last_state, 3, sizeof(float));
}

void selective_state_update_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  const int64_t tiles_per_head = ceil_div(p.headdim, kBlockD), tiles = tiles_per_head * p.nheads;
  // Two rows a warp share A, where there are enough to fill the GPU.
  const int64_t num_sms = exec.context.cuda().num_sms();
  const bool pairs = p.rows * tiles >= 32 * num_sms;
  const int warps = p.rows * tiles >= kMaxWarps * num_sms ? kMaxWarps : 1;
  const int64_t blocks_per_row = ceil_div(tiles, warps);
  with_type(p.dtype, [&](auto* type) {
    with_bool(pairs, [&](auto is_pairs) {
      using T = std::remove_pointer_t<decltype(type)>;
      constexpr int kRows = decltype(is_pairs)::value ? 2 : 1;
      launch_kernel("selective_state_update", selective_state_update_fwd_kernel<T, kRows>,
                    {blocks_for(blocks_per_row * ceil_div(p.rows, kRows), 1), 32 * warps}, exec, p,
                    blocks_per_row, tiles_per_head, exec.context.cuda().faults());
    });
  });
}

}  // namespace ssmcore::cuda
