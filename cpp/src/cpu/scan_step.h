// One step of the scan, as in decoding, for whole tiles of channels that are adjacent in every
// operand: states go from memory through registers and back, and nothing else is written but out.
#pragma once

#include "../selective_scan_params.h"
#include "row.h"
#include "scan_states.h"
#include "tile.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

class ScanStep {
 public:
  // Whether `p` asks for such steps only.
  static bool serves(const SelectiveScanFwdParams& p) {
    const auto adjacent = [](const auto& tensor, int dim) {
      return !tensor || tensor.stride[dim] == 1;
    };
    const bool all_adjacent = adjacent(p.A, 1) && adjacent(p.D, 1) && adjacent(p.delta_bias, 1) &&
                              adjacent(p.u, 2) && adjacent(p.delta, 2) && adjacent(p.z, 2) &&
                              adjacent(p.out, 2) && adjacent(p.initial_state, 2) &&
                              adjacent(p.last_state, 2);
    return p.seqlen == 1 && !p.cu_seqlens && !p.complex && p.B && p.C && !p.chunk_states &&
           !p.delta_sum && p.headdim % kLanes == 0 && all_adjacent;
  }

  // B and C are memory for dstate floats each.
  ScanStep(const SelectiveScanFwdParams& p, const Rows::Row& row, int64_t head, float* B, float* C)
      : p(p), row(row), head(head), B(B), C(C) {}

  // Channels [begin, end) of the head.
  void run(int64_t begin, int64_t end) const {
    const int64_t group = head / (p.nheads / p.ngroups);
    const auto stage = [&](const Strided<4>& tensor, float* floats) {
      const Plane plane = plane_of(tensor, p.dtype, row.batch, group);
      load_row(plane.data, p.dtype, plane.stride_d, p.dstate, floats);
    };
    stage(p.B, B);
    stage(p.C, C);
    with_type(p.dtype,
              [&](auto* type) { run_channels<std::remove_pointer_t<decltype(type)>>(begin, end); });
  }

 private:
  // Memory that is asked for while one tile is computed: lines that far on in each row of A and of
  // the states, which are too short for the hardware to recognise.
  static constexpr int64_t kTilesAhead = 4;

  template <typename T>
  void run_channels(int64_t begin, int64_t end) const {
    const auto channels_of = [&](const Strided<4>& tensor) {
      return static_cast<T*>(plane_of(tensor, p.dtype, row.batch, head).data);
    };
    const auto parameter = [&](const Strided<2>& tensor) {
      return static_cast<const float*>(column_of(tensor, DType::float32, head).data);
    };
    const auto states = [&](const Strided<4>& tensor) {
      return row.slot >= 0 ? plane_of(tensor, DType::float32, row.slot, head) : Plane();
    };
    const T *u = channels_of(p.u), *delta = channels_of(p.delta), *z = channels_of(p.z);
    T* out = channels_of(p.out);
    const float *D = parameter(p.D), *delta_bias = parameter(p.delta_bias);
    const Plane A = plane_of(p.A, DType::float32, head);
    const Plane before = states(p.initial_state), after = states(p.last_state);
    const auto at = [](const Plane& plane, int64_t d, int64_t n) {
      return static_cast<float*>(plane.data) + n * plane.stride_t + d;
    };
    for (int64_t d = begin; d < end; d += kLanes) {
      const Vec u_d = load(u + d);
      Vec dt = load(delta + d) + (delta_bias ? load(delta_bias + d) : Vec{});
      if (p.delta_softplus) dt = softplus(dt);
      const Vec x = dt * u_d;
      Vec y{};
      for (int64_t n = 0; n < p.dstate; ++n) {
        const float* A_n = at(A, d, n);
        __builtin_prefetch(A_n + kTilesAhead * kLanes, 0, 2);
        Vec h{};
        if (before) {
          const float* h_n = at(before, d, n);
          __builtin_prefetch(h_n + kTilesAhead * kLanes, 0, 2);
          h = load(h_n);
        }
        h = advance(h, exp2(dt * (load(A_n) * kLog2e)), x, broadcast(B[n]));
        y += h * broadcast(C[n]);
        if (after) store(at(after, d, n), h);
      }
      if (D) y += load(D + d) * u_d;
      if (z) y *= silu(load(z + d));
      store(out + d, y);
    }
  }

  const SelectiveScanFwdParams& p;
  const Rows::Row row;
  const int64_t head;
  float *B, *C;
};

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
