// The selective scan on the CPU: lanes are channels. Operands are staged as tiles of floats, chunk
// by chunk, so the recurrence (scan_states.h) is the same for every dtype and layout.
#include "../scratch.h"
#include "../thread_pool.h"
#include "scan_operands.h"
#include "scan_step.h"

namespace ssmcore::cpu {

// selective_scan_float64.cpp
void selective_scan_fwd_float64(const SelectiveScanFwdParams& params, const Exec& exec);
size_t selective_scan_fwd_float64_workspace_size(const SelectiveScanFwdParams& params,
                                                 const Context& context);

namespace SSMCORE_CPU_NAMESPACE {
namespace {

// Steps staged at a time: B and C of a chunk and the tiles of four operands fit in the first-level
// cache. Fewer when there are many states.
constexpr int64_t kMaxBlockL = 64;

int64_t block_l(const SelectiveScanFwdParams& p) {
  return max(1, min(min(4096 / p.dstate, kMaxBlockL), p.seqlen));
}

// One worker's memory, as floats.
struct Workspace {
  int64_t per_part, per_tile;                  // values between parts, and between tiles
  float *A, *state, *constant_B, *constant_C;  // (tiles, parts, dstate, kLanes)
  float *D, *delta_bias;                       // (tiles, kLanes)
  float *delta_sum, *delta_sum_lost;           // (tiles, kLanes): a sum, and what rounding lost
  float *B, *C;                                // (steps, dstate, parts)
  float *delta, *delta_u, *u, *y;              // (steps, kLanes)

  Workspace(const SelectiveScanFwdParams& p, Scratch& scratch)
      : per_part(p.dstate * kLanes), per_tile(parts_of(p) * per_part) {
    const int64_t steps = block_l(p);
    for (float** piece : {&A, &state, &constant_B, &constant_C})
      *piece = scratch.floats(kMaxTiles * per_tile);
    for (float** piece : {&D, &delta_bias, &delta_sum, &delta_sum_lost})
      *piece = scratch.floats(kMaxTiles * kLanes);
    for (float** piece : {&B, &C}) *piece = scratch.floats(steps * p.dstate * parts_of(p));
    for (float** piece : {&delta, &delta_u, &u, &y}) *piece = scratch.floats(steps * kLanes);
  }

  static size_t bytes(const SelectiveScanFwdParams& p) {
    Scratch scratch = Scratch::nowhere();
    Workspace(p, scratch);
    return scratch.used();
  }
};

// What one task works on: a row, and the channels [d_begin, d_end) of a head, up to kMaxTiles
// tiles.
struct Task {
  Rows::Row row;
  int64_t row_index, head, d_begin, d_end;
};

class Scan {
 public:
  Scan(const SelectiveScanFwdParams& p, const Workspace& w, const Task& task)
      : p(p), w(w), task(task) {
    const Rows::Row& row = task.row;
    u = plane_of(p.u, p.dtype, row.batch, task.head);
    delta = plane_of(p.delta, p.dtype, row.batch, task.head);
    z = plane_of(p.z, p.dtype, row.batch, task.head);
    out = plane_of(p.out, p.dtype, row.batch, task.head);
    A = plane_of(p.A, state_dtype(p), task.head);
    if (row.slot >= 0)
      initial_state = plane_of(p.initial_state, state_dtype(p), row.slot, task.head);
  }

  void run() {
    for_each_tile([&](int64_t tile, int64_t d, int64_t channels) { load(tile, d, channels); });
    int64_t chunk = p.chunk_states ? first_chunk(p, task.row_index) : 0;
    for (int64_t t = task.row.begin; t < task.row.end;) {
      // Steps up to the next state that is asked for.
      const int64_t done = t - task.row.begin, asked = p.chunk_size - done % max(1, p.chunk_size);
      int64_t steps = min(block_l(p), task.row.end - t);
      if (p.chunk_states) steps = min(steps, asked);
      advance(t, steps);
      t += steps;
      if (p.chunk_states && (steps == asked || t == task.row.end))
        store_states(plane_of(p.chunk_states, state_dtype(p), task.row.batch, chunk++, task.head));
    }
    if (p.last_state && task.row.slot >= 0)
      store_states(plane_of(p.last_state, state_dtype(p), task.row.slot, task.head));
    if (p.delta_sum) {
      const Plane sum = column_of(p.delta_sum, DType::float32, task.row_index, task.head);
      for_each_tile([&](int64_t tile, int64_t d, int64_t channels) {
        store_tile(w.delta_sum + tile * kLanes, sum, d, channels, 0, 1);
      });
    }
  }

 private:
  template <typename Body>
  void for_each_tile(const Body& body) const {
    cpu::SSMCORE_CPU_NAMESPACE::for_each_tile(task.d_begin, task.d_end, body);
  }

  void load(int64_t tile, int64_t d, int64_t channels) const {
    const int64_t at = tile * w.per_tile;
    load_decay(p, task.head, d, channels, w.A + at);
    if (p.constant_B)
      load_parts(plane_of(p.constant_B, state_dtype(p), task.head), p, d, channels,
                 w.constant_B + at);
    if (p.constant_C)
      load_parts(plane_of(p.constant_C, state_dtype(p), task.head), p, d, channels,
                 w.constant_C + at);
    load_parts(initial_state, p, d, channels, w.state + at);
    load_column(p.D, task.head, d, channels, w.D + tile * kLanes);
    load_column(p.delta_bias, task.head, d, channels, w.delta_bias + tile * kLanes);
    store(w.delta_sum + tile * kLanes, Vec{});
    store(w.delta_sum_lost + tile * kLanes, Vec{});
  }

  void advance(int64_t t, int64_t steps) const {
    const int64_t group = task.head / (p.nheads / p.ngroups);
    if (p.B) stage_coefficients(plane_of(p.B, p.dtype, task.row.batch, group), p, t, steps, w.B);
    if (p.C) stage_coefficients(plane_of(p.C, p.dtype, task.row.batch, group), p, t, steps, w.C);
    for_each_tile([&](int64_t tile, int64_t d, int64_t channels) {
      stage_inputs(tile, d, channels, t, steps);
      const int64_t at = tile * w.per_tile;
      const StatesOfTile states{steps,
                                p.dstate,
                                w.per_part,
                                w.A + at,
                                p.constant_B ? w.constant_B + at : w.B,
                                p.constant_C ? w.constant_C + at : w.C,
                                w.delta,
                                w.delta_u,
                                w.state + at,
                                w.y};
      scan_states(states, p.complex, static_cast<bool>(p.constant_B),
                  static_cast<bool>(p.constant_C));
      finish(tile, d, channels, t, steps);
    });
  }

  // Δ = softplus?(delta + delta_bias), Δu and a zero y for one tile and chunk.
  void stage_inputs(int64_t tile, int64_t d, int64_t channels, int64_t t, int64_t steps) const {
    using cpu::SSMCORE_CPU_NAMESPACE::load;
    load_tile(u, d, channels, t, steps, w.u);
    load_tile(delta, d, channels, t, steps, w.delta);
    const Vec bias = load(w.delta_bias + tile * kLanes);
    Vec sum{};
    for (int64_t i = 0; i < steps * kLanes; i += kLanes) {
      Vec dt = load(w.delta + i) + bias;
      if (p.delta_softplus) dt = softplus(dt);
      sum += dt;
      store(w.delta + i, dt);
      store(w.delta_u + i, dt * load(w.u + i));
      store(w.y + i, Vec{});
    }
    // Kahan's summation: a million chunks lose no more than one.
    const Vec before = load(w.delta_sum + tile * kLanes);
    const Vec added = sum - load(w.delta_sum_lost + tile * kLanes), after = before + added;
    store(w.delta_sum + tile * kLanes, after);
    store(w.delta_sum_lost + tile * kLanes, (after - before) - added);
  }

  // out = (y + D u) SiLU(z) for one tile and chunk.
  void finish(int64_t tile, int64_t d, int64_t channels, int64_t t, int64_t steps) const {
    using cpu::SSMCORE_CPU_NAMESPACE::load;
    if (p.D) {
      const Vec D = load(w.D + tile * kLanes);
      for (int64_t i = 0; i < steps * kLanes; i += kLanes)
        store(w.y + i, load(w.y + i) + D * load(w.u + i));
    }
    if (z) {
      load_tile(z, d, channels, t, steps, w.u);  // u is not needed any more
      for (int64_t i = 0; i < steps * kLanes; i += kLanes)
        store(w.y + i, load(w.y + i) * silu(load(w.u + i)));
    }
    store_tile(w.y, out, d, channels, t, steps);
  }

  void store_states(const Plane& states) const {
    for_each_tile([&](int64_t tile, int64_t d, int64_t channels) {
      for (int part = 0; part < parts_of(p); ++part)
        store_tile(w.state + tile * w.per_tile + part * w.per_part, part_of_state(states, part), d,
                   channels, 0, p.dstate);
    });
  }

  const SelectiveScanFwdParams& p;
  const Workspace& w;
  const Task task;
  Plane u, delta, z, out, A, initial_state;
};

}  // namespace

size_t selective_scan_fwd_workspace_size(const SelectiveScanFwdParams& p, const Context& context) {
  if (p.dtype == DType::float64) return selective_scan_fwd_float64_workspace_size(p, context);
  return Scratch::product(Workspace::bytes(p), static_cast<size_t>(context.num_threads()));
}

void selective_scan_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  if (p.dtype == DType::float64) return selective_scan_fwd_float64(p, exec);
  const int64_t tiles = (p.headdim + kLanes - 1) / kLanes;
  // Wider tasks stage B and C less often; enough tasks keep the threads evenly busy, down to one
  // tile each. There is no split over L: every piece would be scanned twice, and its rounding would
  // make the result depend on the number of threads.
  const bool is_step = ScanStep::serves(p);
  const int64_t heads = p.rows * p.nheads;
  const int64_t tasks_wanted = (is_step ? 2 : 4) * exec.context.num_threads();
  const int64_t tiles_wanted = heads * tiles / tasks_wanted;
  const int64_t task_dim = min(is_step ? tiles : kMaxTiles, max(1, tiles_wanted)) * kLanes;
  const int64_t tasks_per_head = (p.headdim + task_dim - 1) / task_dim;
  const Rows rows{p.cu_seqlens, p.state_indices, p.seqlen};

  const size_t bytes = Workspace::bytes(p);
  constexpr int64_t kPerState = 10;  // multiply-adds for one state's step
  const int64_t work = heads * p.headdim * p.seqlen * p.dstate * kPerState;
  const int64_t tasks = heads * tasks_per_head;
  const int workers = workers_with_scratch(exec, bytes, work);
  const auto task_at = [&](int64_t index) {
    const int64_t head = index / tasks_per_head, row = head / p.nheads;
    const int64_t begin = index % tasks_per_head * task_dim;
    return Task{rows[row], row, head % p.nheads, begin, min(begin + task_dim, p.headdim)};
  };
  exec.context.thread_pool().parallel_for(tasks, workers, [&](int64_t index, int worker) {
    Scratch scratch(static_cast<char*>(exec.workspace) + worker * bytes);
    const Workspace workspace(p, scratch);
    const Task task = task_at(index);
    if (is_step)
      ScanStep(p, task.row, task.head, workspace.B, workspace.C).run(task.d_begin, task.d_end);
    else
      Scan(p, workspace, task).run();
  });
}

}  // namespace SSMCORE_CPU_NAMESPACE
}  // namespace ssmcore::cpu
