// The backward of the selective scan on the CPU: lanes are channels, as in the forward. A task is a
// slice of channels of a slice of rows. It goes backward over time block by block, each from the
// state before it, which a forward pass over its chunk has left.
#include "../thread_pool.h"
#include "scan_bwd_sums.h"
#include "scan_states_bwd.h"

namespace ssmcore::cpu {

// selective_scan_bwd_float64.cpp
void selective_scan_bwd_float64(const SelectiveScanBwdParams& params, const Exec& exec);
size_t selective_scan_bwd_float64_workspace_size(const SelectiveScanBwdParams& params);

namespace SSMCORE_CPU_NAMESPACE {
namespace {

// Steps of a block: what is kept of each fits in the second-level cache. Fewer when there are many
// states. A chunk of chunk_states that is no longer needs no forward pass.
constexpr int64_t kMaxBlockL = 64;

int64_t chunk_of(const SelectiveScanFwdParams& p) {
  return p.chunk_states ? min(p.chunk_size, p.seqlen) : p.seqlen;
}

int64_t block_l(const SelectiveScanFwdParams& p) {
  return max(1, min(min(2048 / p.dstate, kMaxBlockL), chunk_of(p)));
}

// One worker's memory, as floats.
struct Workspace {
  int64_t per_part, per_tile;                   // values between parts, and between tiles
  float *A, *dstate, *constant_B, *constant_C;  // (tiles, parts, dstate, kLanes)
  float *D, *delta_bias;                        // (tiles, kLanes)
  float* starts;                                // (tiles, blocks, parts, dstate, kLanes)
  float *B, *C;                                 // (steps, dstate, parts)
  float *dB, *dC;                               // (steps, dstate, parts, kLanes)
  float *u, *delta, *delta_u, *slope, *y;       // (steps, kLanes)
  float *dy, *dgate, *dx, *ddelta;              // (steps, kLanes)
  float *history, *decays, *spare;

  Workspace(const SelectiveScanFwdParams& p, Scratch& scratch)
      : per_part(p.dstate * kLanes), per_tile(parts_of(p) * per_part) {
    const int64_t steps = block_l(p), coefficients = steps * p.dstate * parts_of(p);
    for (float** piece : {&A, &dstate, &constant_B, &constant_C})
      *piece = scratch.floats(kMaxTiles * per_tile);
    for (float** piece : {&D, &delta_bias}) *piece = scratch.floats(kMaxTiles * kLanes);
    starts = scratch.floats({kMaxTiles, ceil_div(chunk_of(p), steps), per_tile});
    for (float** piece : {&B, &C}) *piece = scratch.floats(coefficients);
    for (float** piece : {&dB, &dC}) *piece = scratch.floats(coefficients * kLanes);
    for (float** piece : {&u, &delta, &delta_u, &slope, &y, &dy, &dgate, &dx, &ddelta})
      *piece = scratch.floats(steps * kLanes);
    for (float** piece : {&history, &decays}) *piece = scratch.floats(history_size(steps));
    spare = scratch.floats(max(steps, p.dstate) * kLanes);
  }

  static size_t bytes(const SelectiveScanFwdParams& p) {
    Scratch scratch = Scratch::nowhere();
    Workspace(p, scratch);
    return scratch.used();
  }
};

// Goes backward over one row, with a group of tiles: channels [d_begin, d_end) of a slice of a
// head.
class RowBackward {
 public:
  RowBackward(const SelectiveScanBwdParams& p, const Sums& sums, const Workspace& w,
              const Rows::Row& row, int64_t row_index, int64_t head)
      : p(p), fwd(p.fwd), sums(sums), w(w), row(row), row_index(row_index), head(head) {
    const auto plane = [&](const Strided<4>& tensor) {
      return plane_of(tensor, fwd.dtype, row.batch, head);
    };
    u = plane(fwd.u);
    delta = plane(fwd.delta);
    z = plane(fwd.z);
    dout = plane(p.dout);
    du = plane(p.du);
    ddelta = plane(p.ddelta);
    dz = plane(p.dz);
  }

  void run(int64_t row_slice, int64_t slice, int64_t begin, int64_t end, bool is_first) {
    this->row_slice = row_slice;
    this->slice = slice;
    d_begin = begin;
    d_end = end;
    is_first_group = is_first;
    const Plane dlast_state = state_plane(p.dlast_state);
    for_each([&](int64_t tile, int64_t d, int64_t channels) {
      load_parameters(tile, d, channels);
      load_parts(dlast_state, fwd, d, channels, w.dstate + tile * w.per_tile);
    });
    const int64_t length = row.end - row.begin;
    const int64_t whole = max(1, length);
    const int64_t chunk = fwd.chunk_states ? min(fwd.chunk_size, whole) : whole;
    for (int64_t i = ceil_div(length, chunk); i-- > 0;)
      run_chunk(i, row.begin + i * chunk, min(row.begin + (i + 1) * chunk, row.end));
    if (p.dinitial_state && row.slot >= 0)
      for_each([&](int64_t tile, int64_t d, int64_t channels) {
        store_gradient_parts(w.dstate + tile * w.per_tile, p.dinitial_state,
                             state_plane(p.dinitial_state), fwd, d, channels, w.spare);
      });
  }

 private:
  template <typename Body>
  void for_each(const Body& body) const {
    for_each_tile(d_begin, d_end, body);
  }

  Plane state_plane(const Strided<4>& states) const {
    return row.slot >= 0 ? plane_of(states, state_dtype(fwd), row.slot, head) : Plane{};
  }

  void load_parameters(int64_t tile, int64_t d, int64_t channels) const {
    const int64_t at = tile * w.per_tile;
    load_decay(fwd, head, d, channels, w.A + at);
    if (fwd.constant_B)
      load_parts(plane_of(fwd.constant_B, state_dtype(fwd), head), fwd, d, channels,
                 w.constant_B + at);
    if (fwd.constant_C)
      load_parts(plane_of(fwd.constant_C, state_dtype(fwd), head), fwd, d, channels,
                 w.constant_C + at);
    load_column(fwd.D, head, d, channels, w.D + tile * kLanes);
    load_column(fwd.delta_bias, head, d, channels, w.delta_bias + tile * kLanes);
  }

  void run_chunk(int64_t chunk, int64_t begin, int64_t end) const {
    const Plane start = chunk == 0 ? state_plane(fwd.initial_state)
                                   : plane_of(fwd.chunk_states, state_dtype(fwd), row.batch,
                                              first_chunk(fwd, row_index) + chunk - 1, head);
    for_each([&](int64_t tile, int64_t d, int64_t channels) {
      load_parts(start, fwd, d, channels, start_of(tile, 0));
    });
    const int64_t steps = block_l(fwd), last = ceil_div(end - begin, steps) - 1;
    for (int64_t block = 0; block < last; ++block) find_next_start(block, begin + block * steps);
    for (int64_t block = last; block >= 0; --block) {
      const int64_t t = begin + block * steps;
      run_block(block, t, min(steps, end - t));
    }
  }

  // The state before a block of the chunk.
  float* start_of(int64_t tile, int64_t block) const {
    return w.starts + (tile * ceil_div(chunk_of(fwd), block_l(fwd)) + block) * w.per_tile;
  }

  void stage_both_coefficients(int64_t t, int64_t steps) const {
    const int64_t group = head / (fwd.nheads / fwd.ngroups);
    if (fwd.B) stage_coefficients(plane_of(fwd.B, fwd.dtype, row.batch, group), fwd, t, steps, w.B);
    if (fwd.C) stage_coefficients(plane_of(fwd.C, fwd.dtype, row.batch, group), fwd, t, steps, w.C);
  }

  StatesOfTile states_of(int64_t tile, int64_t steps, float* state) const {
    const int64_t at = tile * w.per_tile;
    return {steps,
            fwd.dstate,
            w.per_part,
            w.A + at,
            fwd.constant_B ? w.constant_B + at : w.B,
            fwd.constant_C ? w.constant_C + at : w.C,
            w.delta,
            w.delta_u,
            state,
            w.y};
  }

  void find_next_start(int64_t block, int64_t t) const {
    const int64_t steps = block_l(fwd);
    stage_both_coefficients(t, steps);
    for_each([&](int64_t tile, int64_t d, int64_t channels) {
      stage_inputs(tile, d, channels, t, steps);
      float* state = start_of(tile, block + 1);
      std::memcpy(state, start_of(tile, block), sizeof(float) * static_cast<size_t>(w.per_tile));
      scan_states(states_of(tile, steps, state), fwd.complex, static_cast<bool>(fwd.constant_B),
                  static_cast<bool>(fwd.constant_C));
    });
  }

  void run_block(int64_t block, int64_t t, int64_t steps) const {
    stage_both_coefficients(t, steps);
    const int64_t sums_of_block = steps * fwd.dstate * parts_of(fwd);
    for (float* sum : {w.dB, w.dC})
      std::memset(sum, 0, sizeof(float) * static_cast<size_t>(sums_of_block * kLanes));
    for_each([&](int64_t tile, int64_t d, int64_t channels) {
      stage_inputs(tile, d, channels, t, steps);
      stage_gradients(d, channels, t, steps);
      float* sum = sums.of_tile(row_slice, head, d / kLanes);
      const BlockOfTile reversed{states_of(tile, steps, start_of(tile, block)),
                                 w.dy,
                                 w.dstate + tile * w.per_tile,
                                 sum,
                                 fwd.constant_B ? sum + sums.dB_at : w.dB,
                                 fwd.constant_C ? sum + sums.dC_at : w.dC,
                                 w.dx,
                                 w.ddelta,
                                 w.history,
                                 w.decays};
      const bool constant_B = static_cast<bool>(fwd.constant_B),
                 constant_C = static_cast<bool>(fwd.constant_C);
      if (fwd.complex)
        reverse_states<true>(reversed, constant_B, constant_C);
      else
        reverse_states<false>(reversed, constant_B, constant_C);
      finish(tile, d, channels, t, steps, sum);
    });
    add_lanes(w.dB, sums_of_block, sums.varying_dB(head, slice, row.batch, t));
    add_lanes(w.dC, sums_of_block, sums.varying_dC(head, slice, row.batch, t));
  }

  // Δ = softplus?(delta + delta_bias), its slope, Δu and a zero y.
  void stage_inputs(int64_t tile, int64_t d, int64_t channels, int64_t t, int64_t steps) const {
    load_tile(u, d, channels, t, steps, w.u);
    load_tile(delta, d, channels, t, steps, w.delta);
    const Vec bias = load(w.delta_bias + tile * kLanes), one = broadcast(1.0f);
    for (int64_t i = 0; i < steps * kLanes; i += kLanes) {
      const Vec raw = load(w.delta + i) + bias;
      const Vec dt = fwd.delta_softplus ? softplus(raw) : raw;
      store(w.slope + i, fwd.delta_softplus ? select(raw > 20.0f, one, sigmoid(raw)) : one);
      store(w.delta + i, dt);
      store(w.delta_u + i, dt * load(w.u + i));
      store(w.y + i, Vec{});
    }
  }

  // dy = dout SiLU(z), and what turns y into dz: dout SiLU'(z).
  void stage_gradients(int64_t d, int64_t channels, int64_t t, int64_t steps) const {
    load_tile(dout, d, channels, t, steps, w.dy);
    if (z) load_tile(z, d, channels, t, steps, w.dgate);
    for (int64_t i = 0; i < steps * kLanes; i += kLanes) {
      store(w.dx + i, Vec{});
      store(w.ddelta + i, Vec{});
      if (!z) continue;
      const Vec gate = load(w.dgate + i), opening = sigmoid(gate), dout_i = load(w.dy + i);
      store(w.dy + i, dout_i * (gate * opening));
      store(w.dgate + i, dout_i * (opening * (1.0f + gate * (1.0f - opening))));
    }
  }

  // From what the states have left: du, ddelta, dz and the sums of dD and ddelta_bias.
  void finish(int64_t tile, int64_t d, int64_t channels, int64_t t, int64_t steps,
              float* sum) const {
    const Vec D = load(w.D + tile * kLanes);
    Vec dD{}, dbias{};
    for (int64_t i = 0; i < steps * kLanes; i += kLanes) {
      const Vec u_i = load(w.u + i), dy = load(w.dy + i), dx = load(w.dx + i);
      const Vec ddelta_i = (u_i * dx + kLn2 * load(w.ddelta + i)) * load(w.slope + i);
      dD += dy * u_i;
      dbias += ddelta_i;
      store(w.ddelta + i, ddelta_i);
      store(w.dx + i, load(w.delta + i) * dx + D * dy);
      if (z) store(w.y + i, load(w.dgate + i) * (load(w.y + i) + D * u_i));
    }
    add(sum + sums.dD_at, dD);
    add(sum + sums.ddelta_bias_at, dbias);
    if (du) store_gradient(w.dx, p.du, du, d, channels, t, steps, w.spare);
    if (ddelta) store_gradient(w.ddelta, p.ddelta, ddelta, d, channels, t, steps, w.spare);
    if (dz) store_gradient(w.y, p.dz, dz, d, channels, t, steps, w.spare);
  }

  // The sums of the lanes of `count` vectors, to the slice's sums, if those are asked for.
  void add_lanes(const float* vectors, int64_t count, float* to) const {
    if (!to) return;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4, vectors += 4 * kLanes) {
      Quad quad = horizontal_sums(load(vectors), load(vectors + kLanes), load(vectors + 2 * kLanes),
                                  load(vectors + 3 * kLanes));
      if (!is_first_group) {
        Quad before;
        std::memcpy(&before, to + i, sizeof(before));
        quad += before;
      }
      std::memcpy(to + i, &quad, sizeof(quad));
    }
    for (; i < count; ++i, vectors += kLanes)
      to[i] = horizontal_sum(load(vectors)) + (is_first_group ? 0.0f : to[i]);
  }

  const SelectiveScanBwdParams& p;
  const SelectiveScanFwdParams& fwd;
  const Sums& sums;
  const Workspace& w;
  const Rows::Row row;
  const int64_t row_index, head;
  int64_t row_slice, slice, d_begin, d_end;
  bool is_first_group;  // of the slice: its sums of dB and dC begin
  Plane u, delta, z, dout, du, ddelta, dz;
};

size_t sums_bytes(const SelectiveScanBwdParams& p, const Cut& cut) {
  Scratch scratch = Scratch::nowhere();
  Sums(p, cut, scratch);
  return scratch.used();
}

}  // namespace

size_t selective_scan_bwd_workspace_size(const SelectiveScanBwdParams& p, const Context& context) {
  if (p.fwd.dtype == DType::float64) return selective_scan_bwd_float64_workspace_size(p);
  return sums_bytes(p, Cut(p.fwd)) +
         Scratch::product(Workspace::bytes(p.fwd), static_cast<size_t>(context.num_threads()));
}

void selective_scan_bwd(const SelectiveScanBwdParams& p, const Exec& exec) {
  if (p.fwd.dtype == DType::float64) return selective_scan_bwd_float64(p, exec);
  const SelectiveScanFwdParams& fwd = p.fwd;
  const Cut cut(fwd);
  Scratch scratch(exec.workspace);
  const Sums sums(p, cut, scratch);
  const Exec rest = scratch.rest(exec);
  const Rows rows{fwd.cu_seqlens, fwd.state_indices, fwd.seqlen};

  const size_t bytes = Workspace::bytes(fwd);
  constexpr int64_t kPerState = 30;  // multiply-adds for one state's step
  const int64_t work = fwd.rows * fwd.nheads * fwd.headdim * fwd.seqlen * fwd.dstate * kPerState;
  const int workers = workers_with_scratch(rest, bytes, work);
  ThreadPool& pool = exec.context.thread_pool();
  const auto workspace_of = [&](int worker) {
    Scratch piece(static_cast<char*>(rest.workspace) + worker * bytes);
    return Workspace(fwd, piece);
  };

  const int64_t tasks = cut.row_slices * fwd.nheads * cut.slices;
  pool.parallel_for(tasks, workers, [&](int64_t task, int worker) {
    const Workspace workspace = workspace_of(worker);
    const int64_t slice = task % cut.slices, head = task / cut.slices % fwd.nheads;
    const int64_t row_slice = task / cut.slices / fwd.nheads;
    const int64_t d_begin = slice * cut.slice_dim,
                  d_end = min(d_begin + cut.slice_dim, fwd.headdim);
    for_each_tile(d_begin, d_end, [&](int64_t, int64_t d, int64_t) {
      std::memset(sums.of_tile(row_slice, head, d / kLanes), 0,
                  sizeof(float) * static_cast<size_t>(sums.per_tile));
    });
    const int64_t first_row = row_slice * cut.slice_rows;
    for (int64_t row = first_row; row < min(first_row + cut.slice_rows, fwd.rows); ++row) {
      RowBackward backward(p, sums, workspace, rows[row], row, head);
      for (int64_t d = d_begin; d < d_end; d += cut.group_dim)
        backward.run(row_slice, slice, d, min(d + cut.group_dim, d_end), d == d_begin);
    }
  });
  pool.parallel_for(sums.channel_tasks(), workers, [&](int64_t task, int worker) {
    sums.finish_channels(task, workspace_of(worker).spare);
  });
  pool.parallel_for(sums.step_tasks(), workers,
                    [&](int64_t task, int) { sums.finish_steps(task); });
}

}  // namespace SSMCORE_CPU_NAMESPACE
}  // namespace ssmcore::cpu
