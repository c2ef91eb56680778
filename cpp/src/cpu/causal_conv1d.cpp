// The causal convolution on the CPU: lanes are channels.
#include "../causal_conv1d_params.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "ssmcore/context.h"
#include "tile.h"
#include "vec_math.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {
namespace {

constexpr int64_t kMaxBlockL = 256;

int64_t block_l(const CausalConv1dFwdParams& p) {
  return min(kMaxBlockL, p.seqlen);
}

// One worker's memory, as floats.
struct Workspace {
  float* weight;  // (width, kLanes)
  float* bias;    // (kLanes)
  float* state;   // (state_len, kLanes)
  float* x;       // (width - 1 + steps, kLanes): a chunk and the inputs before it
  float* out;     // (steps, kLanes)

  Workspace(const CausalConv1dFwdParams& p, Scratch& scratch) {
    weight = scratch.floats(p.width * kLanes);
    bias = scratch.floats(kLanes);
    state = scratch.floats(p.state_len * kLanes);
    x = scratch.floats((p.width - 1 + block_l(p)) * kLanes);
    out = scratch.floats(block_l(p) * kLanes);
  }

  static size_t bytes(const CausalConv1dFwdParams& p) {
    Scratch scratch = Scratch::nowhere();
    Workspace(p, scratch);
    return scratch.used();
  }
};

// kWidth 0: any width.
template <int kWidth>
void convolve(const Workspace& w, int64_t any_width, int64_t steps) {
  const int64_t width = kWidth > 0 ? kWidth : any_width;
  const Vec bias = load(w.bias);
  for (int64_t t = 0; t < steps; ++t) {
    Vec sum = bias;
    for (int64_t i = 0; i < width; ++i)
      sum += load(w.weight + i * kLanes) * load(w.x + (t + i) * kLanes);
    store(w.out + t * kLanes, sum);
  }
}

void convolve(const Workspace& w, int64_t width, int64_t steps) {
  switch (width) {
    case 2:
      return convolve<2>(w, width, steps);
    case 3:
      return convolve<3>(w, width, steps);
    case 4:
      return convolve<4>(w, width, steps);
    default:
      return convolve<0>(w, width, steps);
  }
}

void copy_rows(float* to, const float* from, int64_t rows) {
  std::memmove(to, from, sizeof(float) * rows * kLanes);
}

// The state after the sequence: the last state_len of (state, x), shifted in the staged state.
void update_state(const CausalConv1dFwdParams& p, const Workspace& w, const Plane& x,
                  const Plane& final_state, int64_t d, int64_t channels) {
  const int64_t added = min(p.state_len, p.seqlen), kept = p.state_len - added;
  copy_rows(w.state, w.state + added * kLanes, kept);
  load_tile(x, d, channels, p.seqlen - added, added, w.state + kept * kLanes);
  store_tile(w.state, final_state, d, channels, 0, p.state_len);
}

// One row, one tile of channels.
void convolve_tile(const CausalConv1dFwdParams& p, const Workspace& w, int64_t b, int64_t d,
                   int64_t channels) {
  const Plane x(p.x, p.dtype, b), out(p.out, p.dtype, b);
  const int64_t slot = slot_of(p.state_indices, b);
  const Plane initial_state = state_plane(p.initial_state, p.dtype, slot);
  const Plane final_state = state_plane(p.final_state, p.dtype, slot);
  const int64_t history = p.width - 1;

  load_parameter(p.weight, p.weight_dtype, d, channels, p.width, w.weight);
  load_parameter(p.bias, p.bias_dtype, d, channels, w.bias);
  if (initial_state)
    load_tile(initial_state, d, channels, 0, p.state_len, w.state);
  else
    std::memset(w.state, 0, sizeof(float) * p.state_len * kLanes);
  if (initial_state)
    copy_rows(w.x, w.state + (p.state_len - history) * kLanes, history);
  else
    std::memset(w.x, 0, sizeof(float) * history * kLanes);
  if (final_state) update_state(p, w, x, final_state, d, channels);

  for (int64_t t = 0; t < p.seqlen; t += kMaxBlockL) {
    const int64_t steps = min(kMaxBlockL, p.seqlen - t);
    load_tile(x, d, channels, t, steps, w.x + history * kLanes);
    convolve(w, p.width, steps);
    if (p.activation == Activation::silu)
      for (int64_t i = 0; i < steps; ++i) store(w.out + i * kLanes, silu(load(w.out + i * kLanes)));
    store_tile(w.out, out, d, channels, t, steps);
    copy_rows(w.x, w.x + steps * kLanes, history);
  }
}

}  // namespace

size_t causal_conv1d_fwd_workspace_size(const CausalConv1dFwdParams& p, const Context& context) {
  return Workspace::bytes(p) * static_cast<size_t>(context.num_threads());
}

void causal_conv1d_fwd(const CausalConv1dFwdParams& p, const Exec& exec) {
  // A few tiles a task, so that waking a thread is worth while.
  constexpr int64_t kTaskDim = 4 * kLanes;
  const int64_t tasks_per_row = (p.dim + kTaskDim - 1) / kTaskDim;
  const size_t bytes = Workspace::bytes(p);
  exec.context.thread_pool().parallel_for(
      p.batch * tasks_per_row, workers_with_scratch(exec, bytes), [&](int64_t task, int worker) {
        Scratch scratch(static_cast<char*>(exec.workspace) + worker * bytes);
        const Workspace workspace(p, scratch);
        const int64_t b = task / tasks_per_row, begin = task % tasks_per_row * kTaskDim;
        for_each_tile(begin, min(begin + kTaskDim, p.dim),
                      [&](int64_t, int64_t d, int64_t channels) {
                        convolve_tile(p, workspace, b, d, channels);
                      });
      });
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
