// How the scan's backward is cut into tasks, and the sums over rows (dA, …) and over channels (dB,
// dC): each task leaves its own, and they are added up at the end in a fixed order. The cut depends
// on the problem's sizes alone, so the number of threads does not change a bit.
#pragma once

#include "../scratch.h"
#include "scan_operands.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

// Slices that a head's channels, and the rows, are cut into at most. Sums of dB and dC take
// 2 kMaxSlices dstate numbers a step, those of dA kMaxSlices dstate a channel.
inline constexpr int64_t kMaxSlices = 8;

struct Cut {
  int64_t tiles;                   // of a head
  int64_t group_dim;               // channels that share one staging of B and C
  int64_t slice_dim, slices;       // channels of a slice, slices of a head
  int64_t slice_rows, row_slices;  // rows of a slice, slices of all rows

  explicit Cut(const SelectiveScanFwdParams& p) {
    tiles = ceil_div(p.headdim, kLanes);
    group_dim = max(1, min(tiles / kMaxSlices, kMaxTiles)) * kLanes;
    const int64_t groups = ceil_div(p.headdim, group_dim);
    slice_dim = ceil_div(groups, min(groups, kMaxSlices)) * group_dim;
    slices = ceil_div(p.headdim, slice_dim);
    slice_rows = ceil_div(p.rows, min(p.rows, kMaxSlices));
    row_slices = ceil_div(p.rows, slice_rows);
  }
};

// Adds to a gradient or overwrites it; `spare` holds a tile.
template <int Rank>
void store_gradient(float* tile, const StridedGradient<Rank>& gradient, const Plane& plane,
                    int64_t d, int64_t channels, int64_t t, int64_t steps, float* spare) {
  if (gradient.accumulate) {
    load_tile(plane, d, channels, t, steps, spare);
    for (int64_t i = 0; i < steps * kLanes; i += kLanes)
      store(tile + i, load(tile + i) + load(spare + i));
  }
  store_tile(tile, plane, d, channels, t, steps);
}

// The same for a (parts, dstate, kLanes) gradient of a parameter or a state.
template <int Rank>
void store_gradient_parts(float* tile, const StridedGradient<Rank>& gradient, const Plane& plane,
                          const SelectiveScanFwdParams& p, int64_t d, int64_t channels,
                          float* spare) {
  for (int part = 0; part < parts_of(p); ++part)
    store_gradient(tile + part * p.dstate * kLanes, gradient, part_of_state(plane, part), d,
                   channels, 0, p.dstate, spare);
}

class Sums {
 public:
  Sums(const SelectiveScanBwdParams& p, const Cut& cut, Scratch& scratch) : p(p), cut(cut) {
    const int64_t states = parts_of(p.fwd) * p.fwd.dstate * kLanes;
    dB_at = states;
    dC_at = dB_at + (p.fwd.constant_B ? states : 0);
    dD_at = dC_at + (p.fwd.constant_C ? states : 0);
    ddelta_bias_at = dD_at + kLanes;
    per_tile = ddelta_bias_at + kLanes;
    channels = scratch.floats(cut.row_slices * per_row_slice());
    per_step = p.fwd.dstate * parts_of(p.fwd);
    per_slice = (p.fwd.cu_seqlens ? 1 : p.fwd.rows) * p.fwd.seqlen * per_step;
    if (p.dB) dB = scratch.floats(p.fwd.nheads * cut.slices * per_slice);
    if (p.dC) dC = scratch.floats(p.fwd.nheads * cut.slices * per_slice);
  }

  // Of one tile and slice of rows: dA, constant dB and dC, (parts, dstate, kLanes) each, then dD
  // and ddelta_bias, (kLanes) each.
  float* of_tile(int64_t row_slice, int64_t head, int64_t tile) const {
    return channels + row_slice * per_row_slice() + (head * cut.tiles + tile) * per_tile;
  }
  int64_t dB_at, dC_at, dD_at, ddelta_bias_at, per_tile;

  // Of one slice of channels from step t on, (steps, dstate, parts); null where not asked for.
  float* varying_dB(int64_t head, int64_t slice, int64_t batch, int64_t t) const {
    return of_steps(dB, head * cut.slices + slice, batch, t);
  }
  float* varying_dC(int64_t head, int64_t slice, int64_t batch, int64_t t) const {
    return of_steps(dC, head * cut.slices + slice, batch, t);
  }

  // The sums over slices of rows, into the gradients of parameters. A task: one tile of a head.
  int64_t channel_tasks() const { return p.fwd.nheads * cut.tiles; }
  void finish_channels(int64_t task, float* spare) const {
    const SelectiveScanFwdParams& fwd = p.fwd;
    const int64_t head = task / cut.tiles, tile = task % cut.tiles, d = tile * kLanes;
    const int64_t lanes = min(kLanes, fwd.headdim - d);
    float* sum = of_tile(0, head, tile);
    for (int64_t row_slice = 1; row_slice < cut.row_slices; ++row_slice)
      add_floats(sum, of_tile(row_slice, head, tile), per_tile);
    const auto store_parts = [&](float* from, const StridedGradient<3>& gradient) {
      if (gradient)
        store_gradient_parts(from, gradient, plane_of(gradient, state_dtype(fwd), head), fwd, d,
                             lanes, spare);
    };
    const auto store_column = [&](float* from, const StridedGradient<2>& gradient) {
      if (gradient)
        store_gradient(from, gradient, column_of(gradient, DType::float32, head), d, lanes, 0, 1,
                       spare);
    };
    store_parts(sum, p.dA);
    store_parts(sum + dB_at, p.constant_dB);
    store_parts(sum + dC_at, p.constant_dC);
    store_column(sum + dD_at, p.dD);
    store_column(sum + ddelta_bias_at, p.ddelta_bias);
  }

  // The sums over slices of channels, into dB and dC. A task: some steps of a group of one of them.
  int64_t step_tasks() const { return dB_tasks() + (p.dC ? tasks_of(p.ngroups_C) : 0); }
  void finish_steps(int64_t task) const {
    if (task < dB_tasks())
      finish_steps(task, dB, p.dB, p.ngroups_B);
    else
      finish_steps(task - dB_tasks(), dC, p.dC, p.ngroups_C);
  }

 private:
  static constexpr int64_t kTaskSteps = 64;

  int64_t per_row_slice() const { return p.fwd.nheads * cut.tiles * per_tile; }
  int64_t batch() const { return p.fwd.cu_seqlens ? 1 : p.fwd.rows; }
  int64_t tasks_of(int64_t ngroups) const {
    return batch() * ngroups * ceil_div(p.fwd.seqlen, kTaskSteps);
  }
  int64_t dB_tasks() const { return p.dB ? tasks_of(p.ngroups_B) : 0; }

  float* of_steps(float* sums, int64_t slice, int64_t batch, int64_t t) const {
    return sums ? sums + slice * per_slice + (batch * p.fwd.seqlen + t) * per_step : nullptr;
  }

  static void add_floats(float* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  }

  void finish_steps(int64_t task, float* sums, const StridedGradient<4>& gradient,
                    int64_t ngroups) const {
    const int64_t blocks = ceil_div(p.fwd.seqlen, kTaskSteps), t = task % blocks * kTaskSteps;
    const int64_t steps = min(kTaskSteps, p.fwd.seqlen - t);
    const int64_t group = task / blocks % ngroups, row = task / blocks / ngroups;
    const int64_t slices = p.fwd.nheads / ngroups * cut.slices, first = group * slices;
    float* sum = of_steps(sums, first, row, t);
    for (int64_t slice = first + 1; slice < first + slices; ++slice)
      add_floats(sum, of_steps(sums, slice, row, t), steps * per_step);
    store_coefficients(sum, plane_of(gradient, p.fwd.dtype, row, group), gradient.accumulate, t,
                       steps);
  }

  // The inverse of stage_coefficients.
  void store_coefficients(const float* staged, const Plane& plane, bool accumulate, int64_t t,
                          int64_t steps) const {
    with_type(plane.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const int parts = parts_of(p.fwd);
      const int64_t dstate = p.fwd.dstate;
      T* to = static_cast<T*>(plane.data) + t * parts * plane.stride_t;
      for (int64_t n = 0; n < dstate; ++n)
        for (int64_t i = 0; i < steps; ++i)
          for (int part = 0; part < parts; ++part) {
            T* at = to + n * plane.stride_d + (i * parts + part) * plane.stride_t;
            const float value = staged[(i * dstate + n) * parts + part];
            from_float(accumulate ? value + to_float(*at) : value, at);
          }
    });
  }

  const SelectiveScanBwdParams& p;
  const Cut cut;
  float* channels;
  float *dB = nullptr, *dC = nullptr;  // (nheads, slices, batch, seqlen, dstate, parts)
  int64_t per_step, per_slice;
};

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
