// The causal convolution on the CPU: lanes are channels.
#include "../causal_conv1d_params.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "convolve.h"
#include "float64.h"
#include "ssmcore/context.h"
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
    state = scratch.floats(max(1, p.state_len) * kLanes);
    x = scratch.floats((p.width - 1 + block_l(p)) * kLanes);
    out = scratch.floats(block_l(p) * kLanes);
  }

  static size_t bytes(const CausalConv1dFwdParams& p) {
    Scratch scratch = Scratch::nowhere();
    Workspace(p, scratch);
    return scratch.used();
  }
};

// One row and one tile of channels.
class Convolution {
 public:
  Convolution(const CausalConv1dFwdParams& p, const Workspace& w, const Rows::Row& row,
              int64_t row_index)
      : p(p),
        w(w),
        row(row),
        history(p.width - 1),
        numbers(numbers_of(p.seq_idx, row.batch, p.seqlen)) {
    x = plane_of(p.x, p.dtype, row.batch);
    out = plane_of(p.out, p.dtype, row.batch);
    if (row.slot >= 0) {
      initial_state = plane_of(p.initial_state, p.dtype, row.slot);
      final_state = plane_of(p.final_state, p.dtype, row.slot);
    }
    if (p.cache_seqlens)
      seen = integer_at(p.cache_seqlens.data, DType::int32, row_index * p.cache_seqlens.stride[0]);
  }

  void run(int64_t d, int64_t channels) const {
    load_tile(plane_of(p.weight, p.weight_dtype), d, channels, 0, p.width, w.weight);
    load_tile_or_zeros(column_of(p.bias, p.bias_dtype), d, channels, 1, w.bias);
    if (p.cache_seqlens)
      exchange_circular_state(d, channels);
    else
      exchange_state(d, channels);
    for (int64_t t = row.begin; t < row.end; t += kMaxBlockL) {
      const int64_t steps = min(kMaxBlockL, row.end - t);
      load_tile(x, d, channels, t, steps, w.x + history * kLanes);
      if (numbers)
        convolve_numbered(w.weight, load(w.bias), w.x, p.width, numbers, t, history, steps, w.out);
      else
        convolve(w.weight, load(w.bias), w.x, p.width, steps, w.out);
      if (p.activation == Activation::silu)
        for (int64_t i = 0; i < steps * kLanes; i += kLanes)
          store(w.out + i, silu(load(w.out + i)));
      if (numbers) zero_negative_steps(numbers, t, steps, w.out);
      store_tile(w.out, out, d, channels, t, steps);
      copy_rows(w.x, w.x + steps * kLanes, history);
    }
  }

 private:
  // The inputs before the row into w.x, and the state after it: the last state_len of (state, x).
  // Both at once, since the states may share their memory.
  void exchange_state(int64_t d, int64_t channels) const {
    if (!initial_state) std::memset(w.x, 0, sizeof(float) * history * kLanes);
    if (!initial_state && !final_state) return;
    load_tile_or_zeros(initial_state, d, channels, p.state_len, w.state);
    copy_rows(w.x, w.state + (p.state_len - history) * kLanes, history);
    if (!final_state) return;
    const int64_t added = min(p.state_len, row.end - row.begin), kept = p.state_len - added;
    copy_rows(w.state, w.state + added * kLanes, kept);
    load_tile(x, d, channels, row.end - added, added, w.state + kept * kLanes);
    store_tile(w.state, final_state, d, channels, 0, p.state_len);
  }

  // The same for a state in which input number i is at i modulo state_len.
  void exchange_circular_state(int64_t d, int64_t channels) const {
    const auto place = [&](int64_t number) {
      return (number % p.state_len + p.state_len) % p.state_len;
    };
    std::memset(w.x, 0, sizeof(float) * history * kLanes);
    if (!final_state) return;
    for (int64_t i = 0; i < history; ++i)
      load_tile(final_state, d, channels, place(seen - history + i), 1, w.x + i * kLanes);
    for (int64_t t = max(row.begin, row.end - p.state_len); t < row.end; ++t) {
      load_tile(x, d, channels, t, 1, w.state);
      store_tile(w.state, final_state, d, channels, place(seen + t), 1);
    }
  }

  const CausalConv1dFwdParams& p;
  const Workspace& w;
  const Rows::Row& row;
  const int64_t history;
  const StepNumbers numbers;
  Plane x, out, initial_state, final_state;
  int64_t seen = 0;  // tokens before the row, of a circular state
};

// Decoding: one step of whole tiles of channels that are adjacent in every operand, whose states
// are no longer than the window. Nothing has to be staged then.
bool is_step(const CausalConv1dFwdParams& p) {
  const auto adjacent = [](const auto& tensor, int dim) {
    return !tensor || tensor.stride[dim] == 1;
  };
  return p.seqlen == 1 && !p.cu_seqlens && !p.seq_idx && !p.cache_seqlens && p.final_state &&
         p.initial_state && p.state_len == p.width - 1 && p.dim % kLanes == 0 &&
         p.weight_dtype == DType::float32 && (!p.bias || p.bias_dtype == DType::float32) &&
         adjacent(p.x, 1) && adjacent(p.out, 1) && adjacent(p.weight, 0) && adjacent(p.bias, 0) &&
         adjacent(p.initial_state, 1) && adjacent(p.final_state, 1);
}

template <typename T>
void step(const CausalConv1dFwdParams& p, const Rows::Row& row, int64_t begin, int64_t end) {
  const auto channels = [](const Strided<3>& tensor, int64_t index) {
    return index >= 0 ? static_cast<T*>(tensor.data) + index * tensor.stride[0] : nullptr;
  };
  const T *x = channels(p.x, row.batch), *before = channels(p.initial_state, row.slot);
  T *out = channels(p.out, row.batch), *after = channels(p.final_state, row.slot);
  const auto *weight = static_cast<const float*>(p.weight.data),
             *bias = static_cast<const float*>(p.bias.data);
  for (int64_t d = begin; d < end; d += kLanes) {
    Vec sum = bias ? load(bias + d) : Vec{};
    for (int64_t i = 0; i < p.width; ++i) {
      Vec input{};
      if (i == p.width - 1)
        input = load(x + d);
      else if (before)
        input = load(before + i * p.initial_state.stride[2] + d);
      sum += load(weight + i * p.weight.stride[1] + d) * input;
      if (after && i > 0) store(after + (i - 1) * p.final_state.stride[2] + d, input);
    }
    if (p.activation == Activation::silu) sum = silu(sum);
    store(out + d, sum);
  }
}

}  // namespace

size_t causal_conv1d_fwd_workspace_size(const CausalConv1dFwdParams& p, const Context& context) {
  if (p.dtype == DType::float64) return 0;
  return Scratch::product(Workspace::bytes(p), static_cast<size_t>(context.num_threads()));
}

void causal_conv1d_fwd(const CausalConv1dFwdParams& p, const Exec& exec) {
  if (p.dtype == DType::float64) return causal_conv1d_fwd_float64(p);
  // A few tiles a task, so that waking a thread is worth while.
  constexpr int64_t kTaskDim = 4 * kLanes;
  const int64_t tasks_per_row = (p.dim + kTaskDim - 1) / kTaskDim;
  const Rows rows{p.cu_seqlens, p.state_indices, p.seqlen};
  const size_t bytes = Workspace::bytes(p);
  const bool one_step = is_step(p);
  exec.context.thread_pool().parallel_for(
      p.rows * tasks_per_row,
      workers_with_scratch(exec, bytes, p.rows * p.dim * p.seqlen * p.width),
      [&](int64_t task, int worker) {
        const int64_t index = task / tasks_per_row, begin = task % tasks_per_row * kTaskDim;
        const int64_t end = min(begin + kTaskDim, p.dim);
        const Rows::Row row = rows[index];
        if (one_step)
          return with_type(p.dtype, [&](auto* type) {
            step<std::remove_pointer_t<decltype(type)>>(p, row, begin, end);
          });
        Scratch scratch(static_cast<char*>(exec.workspace) + worker * bytes);
        const Workspace workspace(p, scratch);
        const Convolution convolution(p, workspace, row, index);
        for_each_tile(begin, end,
                      [&](int64_t, int64_t d, int64_t channels) { convolution.run(d, channels); });
      });
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
