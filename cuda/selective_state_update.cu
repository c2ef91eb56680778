// One step of the selective scan, for decoding: a pass over the states at the memory's speed. A
// warp takes some channels of one head, kLanes lanes a channel, 4 neighbouring states a lane.
#include <type_traits>

#include "device/state.cuh"
#include "launch.h"
#include "scan_row.cuh"
#include "selective_scan.h"

namespace ssmcore::cuda {
namespace {

constexpr int kQuad = 4;    // neighbouring states
constexpr int kPasses = 4;  // in which a warp takes its channels
constexpr int kMaxWarps = 4;

using Quad = Vector<float, kQuad>;

// States are not used again soon: they leave the caches first.
__device__ __forceinline__ Quad load_states(const float* from) {
  const float4 loaded = __ldcs(reinterpret_cast<const float4*>(from));
  return {loaded.x, loaded.y, loaded.z, loaded.w};
}
__device__ __forceinline__ void store_states(float* to, const Quad& h) {
  __stcs(reinterpret_cast<float4*>(to), float4{h.value[0], h.value[1], h.value[2], h.value[3]});
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
__device__ __forceinline__ float total_over_lanes(const float (&sums)[kPasses], int lane) {
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
  for (int lanes = kPasses; lanes < kLanes; lanes *= 2) total += __shfl_xor_sync(~0u, total, lanes);
  return total;
}

// Everything is loaded before anything is used, so that there is one latency to wait for: what is
// out of range is clamped and not stored.
template <typename T, int kLanes>
__global__ void __launch_bounds__(32 * kMaxWarps, 6)
    selective_state_update_fwd_kernel(SelectiveScanFwdParams p, int heads_per_group,
                                      uint32_t* faults) {
  constexpr int kChannels = 32 / kLanes, kBlockD = kPasses * kChannels, kBlockN = kLanes * kQuad;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = blockIdx.y, head = blockIdx.z;
  const int64_t group = static_cast<int>(blockIdx.z) / heads_per_group;
  const int64_t first_d = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * kBlockD;
  if (first_d >= p.headdim) return;
  const int last_d = static_cast<int>(min(p.headdim - first_d, static_cast<int64_t>(kBlockD))) - 1;
  // Where it works on states a lane has channels shared + kChannels i, with its neighbours;
  // everything else it does for one of them, the i of which is `own_pass`.
  const int shared = lane / kLanes, own_pass = lane % kPasses, own = shared + kChannels * own_pass;
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

  float sums[kPasses] = {};
  const int dstate = static_cast<int>(p.dstate);
  for (int n0 = 0; n0 < dstate; n0 += kBlockN) {
    const bool is_state = n0 + lane % kLanes * kQuad < dstate;
    const int n = is_state ? n0 + lane % kLanes * kQuad : 0;
    const auto channel = [&](int i) { return first_d + min(shared + kChannels * i, last_d); };
    const auto state_at = [&](const Strided<4>& state, int i) {
      return static_cast<float*>(state.data) + max(slot, int64_t{0}) * state.stride[0] +
             head * state.stride[1] + channel(i) * state.stride[2] + n;
    };
    const auto coefficients = [&](const Strided<4>& tensor) {
      return load_quad(static_cast<const T*>(tensor.data) + row * tensor.stride[0] +
                       group * tensor.stride[1] + n);
    };
    Quad h[kPasses], A[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) h[i] = load_states(state_at(p.initial_state, i));
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const float* from =
          static_cast<const float*>(p.A.data) + head * p.A.stride[0] + channel(i) * p.A.stride[1];
      if (p.A.stride[2] == 1)
        A[i] = load_vector<kQuad>(from + n);
      else  // one number for all states
        A[i] = {*from, *from, *from, *from};
    }
    const Quad B = coefficients(p.B), C = coefficients(p.C);
    float own_dt = to_float(delta) + bias;
    if (p.delta_softplus) own_dt = softplus(own_dt);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const float dt = __shfl_sync(~0u, own_dt, i, kLanes);
      const float x = dt * __shfl_sync(~0u, to_float(u), i, kLanes);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        float& state = h[i].value[k];
        state = advance(decay(dt, rate_of(A[i].value[k])), slot < 0 ? 0.0f : state, x, B.value[k]);
        sums[i] += is_state ? C.value[k] * state : 0.0f;
      }
      if (is_state && shared + kChannels * i <= last_d && slot >= 0)
        store_states(state_at(p.last_state, i), h[i]);
    }
  }
  float y = total_over_lanes<kLanes>(sums, lane) + D * to_float(u);
  if (p.z.data != nullptr) y *= silu(to_float(z));
  if (lane % kLanes < kPasses && own <= last_d)
    static_cast<T*>(
        p.out.data)[row * p.out.stride[0] + head * p.out.stride[1] + own_d * p.out.stride[2]] =
        from_float<T>(y);
}

// Whether dimension `dim`, of states, can be taken four at a time.
template <int kRank>
bool in_quads(const Strided<kRank>& tensor, int dim, size_t size) {
  bool fits = tensor && tensor.stride[dim] == 1 && is_aligned(tensor.data, kQuad * size);
  for (int i = 0; i < dim; ++i) fits = fits && tensor.stride[i] % kQuad == 0;
  return fits;
}

}  // namespace

bool is_state_update(const SelectiveScanFwdParams& p) {
  return p.seqlen == 1 && !p.complex && p.B && p.C && !p.cu_seqlens && !p.chunk_states &&
         !p.delta_sum && p.dstate % kQuad == 0 && std::max(p.rows, p.nheads) <= 65535 &&
         (in_quads(p.A, 2, sizeof(float)) || p.A.stride[2] == 0) &&
         in_quads(p.B, 2, dtype_size(p.dtype)) && in_quads(p.C, 2, dtype_size(p.dtype)) &&
         in_quads(p.initial_state, 3, sizeof(float)) && in_quads(p.last_state, 3, sizeof(float));
}

void selective_state_update_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  with_type(p.dtype, [&](auto* type) {
    with_bool(p.dstate >= 64, [&](auto many_states) {
      using T = std::remove_pointer_t<decltype(type)>;
      constexpr int kLanes = decltype(many_states)::value ? 16 : 4;
      const int64_t warps = ceil_div(p.headdim, kPasses * 32 / kLanes);
      const int warps_of_block = static_cast<int>(std::min<int64_t>(warps, kMaxWarps));
      const dim3 blocks(blocks_for(warps, warps_of_block), static_cast<unsigned>(p.rows),
                        static_cast<unsigned>(p.nheads));
      launch_kernel("selective_state_update", selective_state_update_fwd_kernel<T, kLanes>,
                    {blocks, 32 * warps_of_block}, exec, p, p.nheads / p.ngroups,
                    exec.context.cuda().faults());
    });
  });
}

}  // namespace ssmcore::cuda
