// How the scan and its backward read their operands: parameters and states as tiles, part by part,
// and B and C over some steps.
#pragma once

#include "../selective_scan_params.h"
#include "scan_states.h"
#include "tile.h"

namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE {

// Channel tiles that share one staging of B and C.
inline constexpr int64_t kMaxTiles = 4;

// Complex numbers come in parts.
inline int parts_of(const SelectiveScanFwdParams& p) {
  return p.complex ? 2 : 1;
}

// Of A, constant B and C, and states.
inline DType state_dtype(const SelectiveScanFwdParams& p) {
  return p.complex ? DType::complex64 : DType::float32;
}

inline Plane part_of_state(const Plane& plane, int part) {
  return plane.dtype == DType::complex64 ? part_of(plane, part) : plane;
}

// A (headdim, dstate) parameter or state, zeros where it is absent, as (parts, dstate, kLanes).
inline void load_parts(const Plane& plane, const SelectiveScanFwdParams& p, int64_t d,
                       int64_t channels, float* tile) {
  for (int part = 0; part < parts_of(p); ++part)
    load_tile_or_zeros(part_of_state(plane, part), d, channels, p.dstate,
                       tile + part * p.dstate * kLanes);
}

// A as scan_states takes it.
inline void load_decay(const SelectiveScanFwdParams& p, int64_t head, int64_t d, int64_t channels,
                       float* tile) {
  load_parts(plane_of(p.A, state_dtype(p), head), p, d, channels, tile);
  for (int part = 0; part < parts_of(p); ++part) {
    const float factor = part == 0 ? kLog2e : kTurnsPerRadian;
    for (int64_t n = 0; n < p.dstate; ++n, tile += kLanes) store(tile, load(tile) * factor);
  }
}

// D or delta_bias, zeros where it is absent.
inline void load_column(const Strided<2>& parameter, int64_t head, int64_t d, int64_t channels,
                        float* tile) {
  load_tile_or_zeros(column_of(parameter, DType::float32, head), d, channels, 1, tile);
}

// B or C of one group, (dstate, parts · seqlen), as floats (steps, dstate, parts).
inline void stage_coefficients(const Plane& plane, const SelectiveScanFwdParams& p, int64_t t,
                               int64_t steps, float* staged) {
  with_type(plane.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int parts = parts_of(p);
    const int64_t stride_n = plane.stride_d, stride_t = parts * plane.stride_t;
    const T* from = static_cast<const T*>(plane.data) + t * stride_t;
    if (stride_n == 1 && parts == 1) {
      for (int64_t i = 0; i < steps; ++i) {
        const T* row = from + i * stride_t;
        int64_t n = 0;
        for (; n + kLanes <= p.dstate; n += kLanes) store(staged + i * p.dstate + n, load(row + n));
        for (; n < p.dstate; ++n) staged[i * p.dstate + n] = to_float(row[n]);
      }
      return;
    }
    for (int64_t n = 0; n < p.dstate; ++n)
      for (int64_t i = 0; i < steps; ++i)
        for (int part = 0; part < parts; ++part)
          staged[(i * p.dstate + n) * parts + part] =
              to_float(from[n * stride_n + i * stride_t + part * plane.stride_t]);
  });
}

// The first entry of row `row_index` in chunk_states: packed rows follow one another.
inline int64_t first_chunk(const SelectiveScanFwdParams& p, int64_t row_index) {
  if (!p.cu_seqlens) return 0;
  const Rows rows{p.cu_seqlens, {}, p.seqlen};
  int64_t chunks = 0;
  for (int64_t row = 0; row < row_index; ++row)
    chunks += ceil_div(rows.boundary(row + 1) - rows.boundary(row), p.chunk_size);
  return chunks;
}

}  // namespace ssmcore::cpu::SSMCORE_CPU_NAMESPACE
