// One step of the selective scan, for decoding: a pass over the states at the memory's speed. A
// warp takes some channels of one head, kLanes lanes a channel, each lane a tile of 4 channels by 4
// states: 4 neighbouring states, or channels, whichever are side by side in memory, make 16 bytes.
#include <type_traits>

#include "device/state.cuh"
#include "launch.h"
#include "scan_row.cuh"
#include "selective_scan.h"

namespace ssmcore::cuda {
namespace {

constexpr int kQuad = 4;  // channels, and states, of a tile
constexpr int kMaxWarps = 4;

using Quad = Vector<float, kQuad>;

// States are not used again soon: they leave the caches first.
__device__ __forceinline__ Quad load_states(const float* from) {
  const float4 loaded = __ldcs(reinterpret_cast<const float4*>(from));
  return {loaded.x, loaded.y, loaded.z, loaded.w};
}
__device__ __forceinline__ void store_states(float* to, float a, float b, float c, float d) {
  __stcs(reinterpret_cast<float4*>(to), float4{a, b, c, d});
}

template <typename T>
__device__ __forceinline__ Quad load_quad(const T* from) {
  const auto values = load_vector<kQuad>(from);
  Quad quad;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) quad.value[k] = to_float(values.value[k]);
  return quad;
}

// Of each lane's sums for 4 channels, the total over the lanes for channel lane % 4.
template <int kLanes>
__device__ __forceinline__ float total_over_lanes(const float (&sums)[kQuad], int lane) {
  const bool high = lane & 2, odd = lane & 1;
  float kept[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float sent = high ? sums[k] : sums[k + 2];
    kept[k] = (high ? sums[k + 2] : sums[k]) + __shfl_xor_sync(~0u, sent, 2);
  }
  const float sent = odd ? kept[0] : kept[1];
  float total = (odd ? kept[1] : kept[0]) + __shfl_xor_sync(~0u, sent, 1);
#pragma unroll
  for (int lanes = kQuad; lanes < kLanes; lanes *= 2) total += __shfl_xor_sync(~0u, total, lanes);
  return total;
}

// Everything is loaded before anything is used, so that there is one latency to wait for: what is
// out of range is clamped and not stored.
template <typename T, int kLanes, bool kByChannel>
__global__ void __launch_bounds__(32 * kMaxWarps, 6)
    selective_state_update_fwd_kernel(SelectiveScanFwdParams p, int heads_per_group,
                                      uint32_t* faults) {
  constexpr int kTiles = 32 / kLanes, kBlockD = kQuad * kTiles, kBlockN = kLanes * kQuad;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = blockIdx.y, head = blockIdx.z;
  const int64_t group = static_cast<int>(blockIdx.z) / heads_per_group;
  const int64_t first_d = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * kBlockD;
  if (first_d >= p.headdim) return;
  const int last_d = static_cast<int>(min(p.headdim - first_d, static_cast<int64_t>(kBlockD))) - 1;
  // Channel i of a lane's tile. What concerns no states the lane does for one of them, its own.
  const auto channel = [&](int i) {
    return kByChannel ? lane / kLanes * kQuad + i : lane / kLanes + kTiles * i;
  };
  const int own = channel(lane % kQuad);
  const int64_t own_d = first_d + min(own, last_d);

  const auto activation = [&](const Strided<4>& tensor) {
    return static_cast<const T*>(
        tensor.data)[row * tensor.stride[0] + head * tensor.stride[1] + own_d * tensor.stride[2]];
  };
  const auto parameter = [&](const Strided<2>& tensor) {
    return tensor.data != nullptr
               ? static_cast<const float*>(
                     tensor.data)[head * tensor.stride[0] + own_d * tensor.stride[1]]
               : 0.0f;
  };
  const T u = activation(p.u), delta = activation(p.delta);
  const T z = p.z.data != nullptr ? activation(p.z) : T{};
  const float bias = parameter(p.delta_bias), D = parameter(p.D);
  const int64_t slot = scan_slot(p, row, faults);
  if (p.state_indices.data != nullptr && blockIdx.x == 0 && blockIdx.z == 0)
    report_shared_slot(static_cast<const int32_t*>(p.state_indices.data), p.state_indices.stride[0],
                       row, threadIdx.x, blockDim.x, faults, Fault::selective_scan_shared_slot);
  const auto state_of = [&](const Strided<4>& state) {
    return static_cast<float*>(state.data) + max(slot, int64_t{0}) * state.stride[0] +
           head * state.stride[1];
  };

  float sums[kQuad] = {};
  const int dstate = static_cast<int>(p.dstate);
  for (int n0 = 0; n0 < dstate; n0 += kBlockN) {
    const bool is_state = n0 + lane % kLanes * kQuad < dstate;
    const int n = is_state ? n0 + lane % kLanes * kQuad : 0;
    // tile[i].value[k] is of channel i and state n + k.
    const auto load_by_state = [&](const float* from, int64_t stride_d, const auto& load,
                                   Quad(&tile)[kQuad]) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        tile[i] = load(from + (first_d + min(channel(i), last_d)) * stride_d + n);
    };
    const auto load_by_channel = [&](const float* from, int64_t stride_n, const auto& load,
                                     Quad(&tile)[kQuad]) {
      Quad across[kQuad];
#pragma unroll
      for (int k = 0; k < kQuad; ++k)
        across[k] = load(from + first_d + min(channel(0), last_d + 1 - kQuad) + (n + k) * stride_n);
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        tile[i] = {across[0].value[i], across[1].value[i], across[2].value[i], across[3].value[i]};
    };
    Quad h[kQuad], A[kQuad];
    if constexpr (kByChannel)
      load_by_channel(state_of(p.initial_state), p.initial_state.stride[3], load_states, h);
    else
      load_by_state(state_of(p.initial_state), p.initial_state.stride[2], load_states, h);
    const float* A_of_head = static_cast<const float*>(p.A.data) + head * p.A.stride[0];
    if (p.A.stride[2] == 1) {
      load_by_state(A_of_head, p.A.stride[1], load_vector<kQuad, float>, A);
    } else if (kByChannel && p.A.stride[2] != 0) {
      load_by_channel(A_of_head, p.A.stride[2], load_vector<kQuad, float>, A);
    } else {  // one number for all states
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const float of_channel = A_of_head[(first_d + min(channel(i), last_d)) * p.A.stride[1]];
        A[i] = {of_channel, of_channel, of_channel, of_channel};
      }
    }
    const auto coefficients = [&](const Strided<4>& tensor) {
      return load_quad(static_cast<const T*>(tensor.data) + row * tensor.stride[0] +
                       group * tensor.stride[1] + n);
    };
    const Quad B = coefficients(p.B), C = coefficients(p.C);
    float own_dt = to_float(delta) + bias;
    if (p.delta_softplus) own_dt = softplus(own_dt);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const float dt = __shfl_sync(~0u, own_dt, i, kLanes);
      const float x = dt * __shfl_sync(~0u, to_float(u), i, kLanes);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        float& state = h[i].value[k];
        state = advance(decay(dt, rate_of(A[i].value[k])), slot < 0 ? 0.0f : state, x, B.value[k]);
        sums[i] += is_state ? C.value[k] * state : 0.0f;
      }
    }
    float* to = state_of(p.last_state);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (!is_state || slot < 0 || channel(kByChannel ? 0 : i) > last_d) continue;
      if constexpr (kByChannel)
        store_states(to + first_d + channel(0) + (n + i) * p.last_state.stride[3], h[0].value[i],
                     h[1].value[i], h[2].value[i], h[3].value[i]);
      else
        store_states(to + (first_d + channel(i)) * p.last_state.stride[2] + n, h[i].value[0],
                     h[i].value[1], h[i].value[2], h[i].value[3]);
    }
  }
  float y = total_over_lanes<kLanes>(sums, lane) + D * to_float(u);
  if (p.z.data != nullptr) y *= silu(to_float(z));
  if (lane % kLanes < kQuad && own <= last_d)
    static_cast<T*>(
        p.out.data)[row * p.out.stride[0] + head * p.out.stride[1] + own_d * p.out.stride[2]] =
        from_float<T>(y);
}

// Whether four neighbours in dimension `dim`, of the first `dims`, can be taken at once.
template <int kRank>
bool in_quads(const Strided<kRank>& tensor, int dim, int dims, size_t size) {
  bool fits = tensor && tensor.stride[dim] == 1 && is_aligned(tensor.data, kQuad * size);
  for (int i = 0; i < dims; ++i) fits = fits && (i == dim || tensor.stride[i] % kQuad == 0);
  return fits;
}

bool by_state(const SelectiveScanFwdParams& p) {
  return in_quads(p.initial_state, 3, 4, sizeof(float)) &&
         in_quads(p.last_state, 3, 4, sizeof(float));
}

bool by_channel(const SelectiveScanFwdParams& p) {
  return p.headdim % kQuad == 0 && in_quads(p.initial_state, 2, 4, sizeof(float)) &&
         in_quads(p.last_state, 2, 4, sizeof(float));
}

template <typename T, int kLanes, bool kByChannel>
void launch_selective_state_update_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  const int64_t warps = ceil_div(p.headdim, kQuad * 32 / kLanes);
  const int warps_of_block = static_cast<int>(std::min<int64_t>(warps, kMaxWarps));
  const dim3 blocks(blocks_for(warps, warps_of_block), static_cast<unsigned>(p.rows),
                    static_cast<unsigned>(p.nheads));
  launch_kernel("selective_state_update", selective_state_update_fwd_kernel<T, kLanes, kByChannel>,
                {blocks, 32 * warps_of_block}, exec, p, p.nheads / p.ngroups,
                exec.context.cuda().faults());
}

}  // namespace

bool is_state_update(const SelectiveScanFwdParams& p) {
  const bool is_one_step =
      p.seqlen == 1 && !p.complex && p.B && p.C && !p.cu_seqlens && !p.chunk_states && !p.delta_sum;
  return is_one_step && std::max(p.rows, p.nheads) <= 65535 && p.dstate % kQuad == 0 &&
         in_quads(p.B, 2, 3, dtype_size(p.dtype)) && in_quads(p.C, 2, 3, dtype_size(p.dtype)) &&
         (by_state(p) || by_channel(p)) &&
         (p.A.stride[2] == 0 || in_quads(p.A, 2, 3, sizeof(float)) ||
          (!by_state(p) && in_quads(p.A, 1, 3, sizeof(float))));
}

void selective_state_update_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!by_state(p))
      launch_selective_state_update_fwd<T, 4, true>(p, exec);
    else if (p.dstate >= 64)  // more lanes, more warps
      launch_selective_state_update_fwd<T, 16, false>(p, exec);
    else
      launch_selective_state_update_fwd<T, 4, false>(p, exec);
  });
}

}  // namespace ssmcore::cuda
