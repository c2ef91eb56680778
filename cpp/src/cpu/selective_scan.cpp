// The selective scan on the CPU: lanes are channels, states stay in registers, time is serial.
#include <type_traits>

#include "../scratch.h"
#include "../selective_scan_params.h"
#include "../thread_pool.h"
#include "ssmcore/context.h"
#include "tile.h"
#include "vec_math.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {
namespace {

// States that one pass over time keeps in registers, beside the operands of a step.
#if defined(__AVX512F__)
constexpr int kBlockN = 16;
#elif defined(__AVX__)
constexpr int kBlockN = 8;
#else
constexpr int kBlockN = 4;
#endif

// Steps staged at a time: B and C of a chunk and the tiles of four operands fit in the first-level
// cache. Fewer when there are many states.
constexpr int64_t kMaxBlockL = 64;
// Channel tiles that share one staging of B and C.
constexpr int64_t kMaxTiles = 4;

int64_t block_l(const SelectiveScanFwdParams& p) {
  const int64_t steps = 4096 / p.dstate;
  return max(1, min(min(steps, kMaxBlockL), p.seqlen));
}

// One worker's memory, as floats.
struct Workspace {
  float *A, *state, *constant_B, *constant_C;  // (tiles, dstate, kLanes)
  float *D, *delta_bias;                       // (tiles, kLanes)
  float *B, *C;                                // (steps, dstate)
  float *delta, *delta_u, *u, *y;              // (steps, kLanes)

  Workspace(const SelectiveScanFwdParams& p, Scratch& scratch) {
    const int64_t steps = block_l(p);
    for (float** piece : {&A, &state, &constant_B, &constant_C})
      *piece = scratch.floats(kMaxTiles * p.dstate * kLanes);
    for (float** piece : {&D, &delta_bias}) *piece = scratch.floats(kMaxTiles * kLanes);
    for (float** piece : {&B, &C}) *piece = scratch.floats(steps * p.dstate);
    for (float** piece : {&delta, &delta_u, &u, &y}) *piece = scratch.floats(steps * kLanes);
  }

  static size_t bytes(const SelectiveScanFwdParams& p) {
    Scratch scratch = Scratch::nowhere();
    Workspace(p, scratch);
    return scratch.used();
  }
};

// B or C at one step: the same for all channels of a group where it varies in time, one number a
// channel where it is constant.
template <bool kConstant>
SSMCORE_INLINE Vec coefficient(const float* at) {
  if constexpr (kConstant)
    return load(at);
  else
    return broadcast(*at);
}

// Advances kN states of one channel tile over `steps` and adds their share to y. A holds A log2(e).
template <int kN, bool kConstantB, bool kConstantC>
void scan_states(int64_t steps, int64_t dstate, const float* A, const float* B, const float* C,
                 const float* delta, const float* delta_u, float* state, float* y) {
  Vec h[kN];
  for (int n = 0; n < kN; ++n) h[n] = load(state + n * kLanes);
  for (int64_t t = 0; t < steps; ++t) {
    const Vec dt = load(delta + t * kLanes), x = load(delta_u + t * kLanes);
    const float* b = kConstantB ? B : B + t * dstate;
    const float* c = kConstantC ? C : C + t * dstate;
    Vec sum = load(y + t * kLanes);
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      const Vec decay = exp2(dt * load(A + n * kLanes));
      h[n] = decay * h[n] + x * coefficient<kConstantB>(b + (kConstantB ? n * kLanes : n));
      sum += h[n] * coefficient<kConstantC>(c + (kConstantC ? n * kLanes : n));
    }
    store(y + t * kLanes, sum);
  }
  for (int n = 0; n < kN; ++n) store(state + n * kLanes, h[n]);
}

// All states of one channel tile over one chunk of time.
template <bool kConstantB, bool kConstantC>
void scan_tile(const SelectiveScanFwdParams& p, const Workspace& w, int64_t tile, int64_t steps) {
  const int64_t offset = tile * p.dstate * kLanes;
  const auto advance = [&](auto count, int64_t n) {
    const int64_t at = offset + n * kLanes;
    scan_states<decltype(count)::value, kConstantB, kConstantC>(
        steps, p.dstate, w.A + at, kConstantB ? w.constant_B + at : w.B + n,
        kConstantC ? w.constant_C + at : w.C + n, w.delta, w.delta_u, w.state + at, w.y);
  };
  int64_t n = 0;
  for (; n + kBlockN <= p.dstate; n += kBlockN) advance(std::integral_constant<int, kBlockN>(), n);
  for (; n + 4 <= p.dstate; n += 4) advance(std::integral_constant<int, 4>(), n);
  for (; n < p.dstate; ++n) advance(std::integral_constant<int, 1>(), n);
}

void scan_tile(const SelectiveScanFwdParams& p, const Workspace& w, int64_t tile, int64_t steps) {
  const auto scan = p.constant_B
                        ? (p.constant_C ? scan_tile<true, true> : scan_tile<true, false>)
                        : (p.constant_C ? scan_tile<false, true> : scan_tile<false, false>);
  scan(p, w, tile, steps);
}

// B or C of one group over a chunk, as floats, (steps, dstate).
void stage_coefficients(const Strided<4>& tensor, DType dtype, int64_t b, int64_t group, int64_t t,
                        int64_t steps, int64_t dstate, float* staged) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(tensor.data) + b * tensor.stride[0] +
                    group * tensor.stride[1] + t * tensor.stride[3];
    const int64_t stride_n = tensor.stride[2], stride_t = tensor.stride[3];
    if (stride_n == 1) {
      for (int64_t i = 0; i < steps; ++i) {
        const T* row = from + i * stride_t;
        int64_t n = 0;
        for (; n + kLanes <= dstate; n += kLanes) store(staged + i * dstate + n, load(row + n));
        for (; n < dstate; ++n) staged[i * dstate + n] = to_float(row[n]);
      }
    } else {
      for (int64_t n = 0; n < dstate; ++n)
        for (int64_t i = 0; i < steps; ++i)
          staged[i * dstate + n] = to_float(from[n * stride_n + i * stride_t]);
    }
  });
}

// Δ = softplus?(delta + delta_bias), Δu and a zero y for one channel tile and chunk.
void stage_inputs(const SelectiveScanFwdParams& p, const Workspace& w, const Plane& u,
                  const Plane& delta, int64_t d, int64_t channels, int64_t tile, int64_t t,
                  int64_t steps) {
  load_tile(u, d, channels, t, steps, w.u);
  load_tile(delta, d, channels, t, steps, w.delta);
  const Vec bias = load(w.delta_bias + tile * kLanes);
  for (int64_t i = 0; i < steps; ++i) {
    Vec dt = load(w.delta + i * kLanes) + bias;
    if (p.delta_softplus) dt = softplus(dt);
    store(w.delta + i * kLanes, dt);
    store(w.delta_u + i * kLanes, dt * load(w.u + i * kLanes));
    store(w.y + i * kLanes, Vec{});
  }
}

// out = (y + D u) SiLU(z) for one channel tile and chunk.
void finish(const SelectiveScanFwdParams& p, const Workspace& w, const Plane& z, const Plane& out,
            int64_t d, int64_t channels, int64_t tile, int64_t t, int64_t steps) {
  if (p.D) {
    const Vec D = load(w.D + tile * kLanes);
    for (int64_t i = 0; i < steps; ++i)
      store(w.y + i * kLanes, load(w.y + i * kLanes) + D * load(w.u + i * kLanes));
  }
  if (z) {
    load_tile(z, d, channels, t, steps, w.u);  // u is not needed any more
    for (int64_t i = 0; i < steps; ++i)
      store(w.y + i * kLanes, load(w.y + i * kLanes) * silu(load(w.u + i * kLanes)));
  }
  store_tile(w.y, out, d, channels, t, steps);
}

// One row, and the channels [d_begin, d_end) of one group: up to kMaxTiles tiles.
void scan_channels(const SelectiveScanFwdParams& p, const Workspace& w, int64_t b, int64_t group,
                   int64_t d_begin, int64_t d_end) {
  const Plane u(p.u, p.dtype, b), delta(p.delta, p.dtype, b), z(p.z, p.dtype, b),
      out(p.out, p.dtype, b);
  const int64_t slot = slot_of(p.state_indices, b);
  const Plane initial = state_plane(p.initial_state, DType::float32, slot);
  const Plane last = state_plane(p.last_state, DType::float32, slot);

  for_each_tile(d_begin, d_end, [&](int64_t tile, int64_t d, int64_t channels) {
    const int64_t at = tile * p.dstate * kLanes;
    const auto load_parameters = [&](const Strided<2>& parameter, float* to) {
      load_parameter(parameter, DType::float32, d, channels, p.dstate, to + at);
    };
    load_parameters(p.A, w.A);
    for (int64_t n = 0; n < p.dstate; ++n) {
      float* A = w.A + at + n * kLanes;
      store(A, load(A) * kLog2e);
    }
    if (p.constant_B) load_parameters(p.constant_B, w.constant_B);
    if (p.constant_C) load_parameters(p.constant_C, w.constant_C);
    load_parameter(p.D, DType::float32, d, channels, w.D + tile * kLanes);
    load_parameter(p.delta_bias, DType::float32, d, channels, w.delta_bias + tile * kLanes);
    if (initial)
      load_tile(initial, d, channels, 0, p.dstate, w.state + at);
    else
      std::memset(w.state + at, 0, sizeof(float) * p.dstate * kLanes);
  });

  const int64_t chunk = block_l(p);
  for (int64_t t = 0; t < p.seqlen; t += chunk) {
    const int64_t steps = min(chunk, p.seqlen - t);
    if (p.B) stage_coefficients(p.B, p.dtype, b, group, t, steps, p.dstate, w.B);
    if (p.C) stage_coefficients(p.C, p.dtype, b, group, t, steps, p.dstate, w.C);
    for_each_tile(d_begin, d_end, [&](int64_t tile, int64_t d, int64_t channels) {
      stage_inputs(p, w, u, delta, d, channels, tile, t, steps);
      scan_tile(p, w, tile, steps);
      finish(p, w, z, out, d, channels, tile, t, steps);
    });
  }

  if (last)
    for_each_tile(d_begin, d_end, [&](int64_t tile, int64_t d, int64_t channels) {
      store_tile(w.state + tile * p.dstate * kLanes, last, d, channels, 0, p.dstate);
    });
}

}  // namespace

size_t selective_scan_fwd_workspace_size(const SelectiveScanFwdParams& p, const Context& context) {
  return Workspace::bytes(p) * static_cast<size_t>(context.num_threads());
}

void selective_scan_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  const int64_t group_dim = p.dim / p.ngroups;
  const int64_t tiles = (group_dim + kLanes - 1) / kLanes;
  // Wider tasks stage B and C less often; enough tasks keep the threads evenly busy.
  const int64_t rows = p.batch * p.ngroups;
  const int64_t tiles_wanted = rows * tiles / (4 * exec.context.num_threads());
  const int64_t task_dim = min(kMaxTiles, max(1, tiles_wanted)) * kLanes;
  const int64_t tasks_per_group = (group_dim + task_dim - 1) / task_dim;

  const size_t bytes = Workspace::bytes(p);
  exec.context.thread_pool().parallel_for(
      rows * tasks_per_group, workers_with_scratch(exec, bytes), [&](int64_t task, int worker) {
        Scratch scratch(static_cast<char*>(exec.workspace) + worker * bytes);
        const Workspace workspace(p, scratch);
        const int64_t row = task / tasks_per_group, b = row / p.ngroups, group = row % p.ngroups;
        const int64_t d_group = group * group_dim;
        const int64_t d_begin = d_group + task % tasks_per_group * task_dim;
        const int64_t d_end = min(d_begin + task_dim, d_group + group_dim);
        scan_channels(p, workspace, b, group, d_begin, d_end);
      });
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
