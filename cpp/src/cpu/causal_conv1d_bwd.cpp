// The gradients of the causal convolution on the CPU: lanes are channels. Going through a row once,
// a step's gradient before the activation, g(t), is kept for as long as inputs still need it: those
// of x(t) are a convolution of g(t), …, g(t + width - 1) with the weights in reverse.
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
// Rows are summed in at most so many groups, whatever the number of threads, and then the groups.
constexpr int64_t kMaxGroups = 16;
// A few tiles a task, so that waking a thread is worth while.
constexpr int64_t kTaskDim = 4 * kLanes;

int64_t block_l(const CausalConv1dFwdParams& p) {
  return max(min(kMaxBlockL, p.seqlen), p.width - 1);
}

// One worker's memory, as tiles of floats.
struct Workspace {
  float* weight;    // (width)
  float* reversed;  // (width)
  float* bias;      // (1)
  float* x;         // (width - 1 + steps): a chunk and the inputs before it
  float* g;         // (width - 1 + steps), of the same steps
  float* out;       // (steps): before the activation, then the gradients of inputs
  float* there;     // (steps): what is added to a gradient

  Workspace(const CausalConv1dFwdParams& p, Scratch& scratch) {
    const int64_t steps = block_l(p);
    weight = scratch.floats(p.width * kLanes);
    reversed = scratch.floats(p.width * kLanes);
    bias = scratch.floats(kLanes);
    for (float** piece : {&x, &g}) *piece = scratch.floats((p.width - 1 + steps) * kLanes);
    for (float** piece : {&out, &there}) *piece = scratch.floats(steps * kLanes);
  }

  static size_t bytes(const CausalConv1dFwdParams& p) {
    Scratch scratch = Scratch::nowhere();
    Workspace(p, scratch);
    return scratch.used();
  }
};

// The sums over the rows of a group, (groups, tiles, width + 1, kLanes): dweight, then dbias.
struct Sums {
  float* data;
  int64_t groups, tiles, tile_floats;

  Sums(const CausalConv1dBwdParams& p, Scratch& scratch)
      : groups(min(p.fwd.rows, kMaxGroups)),
        tiles(ceil_div(p.fwd.dim, kLanes)),
        tile_floats((p.fwd.width + 1) * kLanes) {
    data = p.dweight || p.dbias ? scratch.floats(groups * tiles * tile_floats) : nullptr;
  }
  float* tile(int64_t group, int64_t index) const {
    return data + (group * tiles + index) * tile_floats;
  }
};

template <int Rank, typename... Index>
Plane gradient_plane(const StridedGradient<Rank>& gradient, Index... index) {
  return plane_of(static_cast<const Strided<Rank>&>(gradient), gradient.dtype, index...);
}

void add_rows(float* to, const float* from, int64_t rows) {
  for (int64_t i = 0; i < rows * kLanes; i += kLanes) store(to + i, load(to + i) + load(from + i));
}

// sums(i) += Σ_t g(t) x(t + i) and sums(width) += Σ_t g(t), steps of one chunk first.
void add_sums(const float* g, const float* x, int64_t any_width, int64_t steps, float* sums) {
  with_width(any_width, [&](auto width) {
    Vec sum[kMaxConvWidth + 1] = {};
    for (int64_t t = 0; t < steps; ++t) {
      const Vec g_t = load(g + t * kLanes);
      for (int64_t i = 0; i < width; ++i) sum[i] += g_t * load(x + (t + i) * kLanes);
      sum[width] += g_t;
    }
    for (int64_t i = 0; i <= width; ++i) store(sums + i * kLanes, load(sums + i * kLanes) + sum[i]);
  });
}

void add_sums_numbered(const float* g, const float* x, int64_t width, const StepNumbers& numbers,
                       int64_t t, int64_t steps, float* sums) {
  Vec sum[kMaxConvWidth + 1] = {};
  for (int64_t i = 0; i < steps; ++i) {
    if (numbers[t + i] < 0) continue;
    const Vec g_i = load(g + i * kLanes);
    for (int64_t k = 0; k < width; ++k)
      if (numbers.same(t + i, t + i - (width - 1) + k)) sum[k] += g_i * load(x + (i + k) * kLanes);
    sum[width] += g_i;
  }
  for (int64_t k = 0; k <= width; ++k) store(sums + k * kLanes, load(sums + k * kLanes) + sum[k]);
}

// One row and one tile of channels. Inputs are counted from the row's first step; those before it,
// from -state_len on, are its initial state.
class Gradients {
 public:
  Gradients(const CausalConv1dBwdParams& p, const Workspace& w, const Rows::Row& row)
      : p(p),
        fwd(p.fwd),
        w(w),
        row(row),
        history(p.fwd.width - 1),
        length(row.end - row.begin),
        numbers(numbers_of(p.fwd.seq_idx, row.batch, p.fwd.seqlen)) {
    x = plane_of(fwd.x, fwd.dtype, row.batch);
    dout = plane_of(p.dout, fwd.dtype, row.batch);
    dx = gradient_plane(p.dx, row.batch);
    if (row.slot < 0) return;
    initial_state = plane_of(fwd.initial_state, fwd.dtype, row.slot);
    dfinal_state = plane_of(p.dfinal_state, fwd.dtype, row.slot);
    dinitial_state = gradient_plane(p.dinitial_state, row.slot);
  }

  // w.weight, w.reversed and w.bias hold the tile's.
  void run(int64_t d, int64_t channels, float* sums) const {
    if (initial_state)
      load_tile(initial_state, d, channels, fwd.state_len - history, history, w.x);
    else
      std::memset(w.x, 0, sizeof(float) * history * kLanes);
    std::memset(w.g, 0, sizeof(float) * history * kLanes);
    store_oldest_inputs(d, channels);
    for (int64_t t = 0; t < length; t += kMaxBlockL) {
      const int64_t steps = min(kMaxBlockL, length - t);
      load_tile(x, d, channels, row.begin + t, steps, w.x + history * kLanes);
      load_tile(dout, d, channels, row.begin + t, steps, w.g + history * kLanes);
      differentiate_activation(t, steps);
      if (sums) {
        const float* g = w.g + history * kLanes;
        if (numbers)
          add_sums_numbered(g, w.x, fwd.width, numbers, t, steps, sums);
        else
          add_sums(g, w.x, fwd.width, steps, sums);
      }
      store_inputs_before(t, d, channels, steps);
      copy_rows(w.x, w.x + steps * kLanes, history);
      copy_rows(w.g, w.g + steps * kLanes, history);
    }
    std::memset(w.g + history * kLanes, 0, sizeof(float) * history * kLanes);
    store_inputs_before(length, d, channels, history);
  }

 private:
  // dout of a chunk, in w.g, becomes g.
  void differentiate_activation(int64_t t, int64_t steps) const {
    float* g = w.g + history * kLanes;
    if (fwd.activation == Activation::silu) {
      const Vec bias = load(w.bias);
      if (numbers)
        convolve_numbered(w.weight, bias, w.x, fwd.width, numbers, t, history, steps, w.out);
      else
        convolve(w.weight, bias, w.x, fwd.width, steps, w.out);
      for (int64_t i = 0; i < steps * kLanes; i += kLanes)
        store(g + i, load(g + i) * silu_slope(load(w.out + i)));
    }
    if (numbers) zero_negative_steps(numbers, t, steps, g);
  }

  // The inputs [t - history, t - history + steps), which no later step depends on.
  void store_inputs_before(int64_t t, int64_t d, int64_t channels, int64_t steps) const {
    if (!dx && !dinitial_state) return;
    if (numbers) {
      // Numbered steps have no state: what is before the first is left out.
      const int64_t skipped = min(steps, max(0, history - t)), first = t - history + skipped;
      convolve_numbered(w.reversed, Vec{}, w.g + skipped * kLanes, fwd.width, numbers, first, 0,
                        steps - skipped, w.out);
      store_inputs(first, d, channels, steps - skipped);
    } else {
      convolve(w.reversed, Vec{}, w.g, fwd.width, steps, w.out);
      store_inputs(t - history, d, channels, steps);
    }
  }

  // Those of the initial state that no step sees.
  void store_oldest_inputs(int64_t d, int64_t channels) const {
    if (!dinitial_state) return;
    const int64_t unseen = fwd.state_len - history, block = block_l(fwd);
    for (int64_t i = 0; i < unseen; i += block) {
      const int64_t count = min(block, unseen - i);
      std::memset(w.out, 0, sizeof(float) * count * kLanes);
      store_inputs(i - fwd.state_len, d, channels, count);
    }
  }

  // What is in w.out, and what comes through the final state, which is the last inputs.
  void store_inputs(int64_t first, int64_t d, int64_t channels, int64_t count) const {
    const int64_t end = first + count, kept = max(first, length - fwd.state_len);
    if (dfinal_state && kept < end) {
      load_tile(dfinal_state, d, channels, kept - (length - fwd.state_len), end - kept, w.there);
      add_rows(w.out + (kept - first) * kLanes, w.there, end - kept);
    }
    const int64_t of_state = min(count, max(0, -first)), of_x = count - of_state;
    if (dinitial_state && of_state > 0)
      store_gradient(w.out, dinitial_state, p.dinitial_state.accumulate, d, channels,
                     first + fwd.state_len, of_state);
    if (dx && of_x > 0)
      store_gradient(w.out + of_state * kLanes, dx, p.dx.accumulate, d, channels,
                     row.begin + first + of_state, of_x);
  }

  void store_gradient(float* tile, const Plane& plane, bool accumulate, int64_t d, int64_t channels,
                      int64_t t, int64_t steps) const {
    if (accumulate) {
      load_tile(plane, d, channels, t, steps, w.there);
      add_rows(tile, w.there, steps);
    }
    store_tile(tile, plane, d, channels, t, steps);
  }

  const CausalConv1dBwdParams& p;
  const CausalConv1dFwdParams& fwd;
  const Workspace& w;
  const Rows::Row& row;
  const int64_t history, length;
  const StepNumbers numbers;
  Plane x, dout, dx, initial_state, dfinal_state, dinitial_state;
};

void load_parameters(const CausalConv1dFwdParams& p, const Workspace& w, int64_t d,
                     int64_t channels) {
  load_tile(plane_of(p.weight, p.weight_dtype), d, channels, 0, p.width, w.weight);
  for (int64_t i = 0; i < p.width; ++i)
    copy_rows(w.reversed + i * kLanes, w.weight + (p.width - 1 - i) * kLanes, 1);
  load_tile_or_zeros(column_of(p.bias, p.bias_dtype), d, channels, 1, w.bias);
}

// Of one tile, over the groups.
void store_sums(const CausalConv1dBwdParams& p, const Sums& sums, int64_t index, int64_t d,
                int64_t channels) {
  const int64_t width = p.fwd.width;
  float total[(kMaxConvWidth + 1) * kLanes] = {}, there[kMaxConvWidth * kLanes];
  for (int64_t group = 0; group < sums.groups; ++group)
    add_rows(total, sums.tile(group, index), width + 1);
  const auto put = [&](float* tile, const Plane& plane, bool accumulate, int64_t steps) {
    if (!plane) return;
    if (accumulate) {
      load_tile(plane, d, channels, 0, steps, there);
      add_rows(tile, there, steps);
    }
    store_tile(tile, plane, d, channels, 0, steps);
  };
  put(total, gradient_plane(p.dweight), p.dweight.accumulate, width);
  put(total + width * kLanes, column_of(static_cast<const Strided<1>&>(p.dbias), p.dbias.dtype),
      p.dbias.accumulate, 1);
}

}  // namespace

size_t causal_conv1d_bwd_workspace_size(const CausalConv1dBwdParams& p, const Context& context) {
  if (p.fwd.dtype == DType::float64) return 0;
  Scratch scratch = Scratch::nowhere();
  Sums(p, scratch);
  scratch.bytes(
      Scratch::product(Workspace::bytes(p.fwd), static_cast<size_t>(context.num_threads())));
  return scratch.used();
}

void causal_conv1d_bwd(const CausalConv1dBwdParams& p, const Exec& exec) {
  const CausalConv1dFwdParams& fwd = p.fwd;
  if (fwd.dtype == DType::float64) return causal_conv1d_bwd_float64(p);
  Scratch scratch(exec.workspace);
  const Sums sums(p, scratch);
  const Exec rest = scratch.rest(exec);
  const Rows rows{fwd.cu_seqlens, fwd.state_indices, fwd.seqlen};
  const int64_t tasks_per_group = ceil_div(fwd.dim, kTaskDim);
  const int64_t rows_per_group = ceil_div(fwd.rows, sums.groups);
  const size_t bytes = Workspace::bytes(fwd);
  ThreadPool& pool = exec.context.thread_pool();
  pool.parallel_for(
      sums.groups * tasks_per_group,
      workers_with_scratch(rest, bytes, 4 * fwd.rows * fwd.dim * fwd.seqlen * fwd.width),
      [&](int64_t task, int worker) {
        Scratch own(static_cast<char*>(rest.workspace) + worker * bytes);
        const Workspace w(fwd, own);
        const int64_t group = task / tasks_per_group, begin = task % tasks_per_group * kTaskDim;
        const int64_t first = group * rows_per_group, end = min(first + rows_per_group, fwd.rows);
        for_each_tile(begin, min(begin + kTaskDim, fwd.dim),
                      [&](int64_t tile, int64_t d, int64_t channels) {
                        load_parameters(fwd, w, d, channels);
                        float* sum = nullptr;
                        if (sums.data) {
                          sum = sums.tile(group, begin / kLanes + tile);
                          std::memset(sum, 0, sizeof(float) * sums.tile_floats);
                        }
                        for (int64_t index = first; index < end; ++index) {
                          const Rows::Row row = rows[index];
                          Gradients(p, w, row).run(d, channels, sum);
                        }
                      });
      });
  if (sums.data)
    for_each_tile(0, fwd.dim, [&](int64_t tile, int64_t d, int64_t channels) {
      store_sums(p, sums, tile, d, channels);
    });
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
