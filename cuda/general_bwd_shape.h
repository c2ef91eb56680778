// How the general backward of the scan is spread over the device, and its memory. A real state is
// one number, a complex one two.
#pragma once

#include <cstdint>

#include "../cpp/src/scratch.h"
#include "../cpp/src/selective_scan_params.h"
#include "device/types.cuh"

namespace ssmcore::cuda {

// A tile is what the threads of a block can hold at a time: some channels of a head, four numbers
// of their states a thread. Time is cut into segments of positions in the batch (not in the packed
// rows), a launch each, last first, so that no memory grows with dim times seqlen; and in a segment
// into blocks, of which the states are kept on chip.
struct GeneralBwdShape {
  static constexpr int kThreads = 128, kQuad = 4;
  static constexpr int kMaxStates = 256;

  int lanes, tile_d, block_l;   // of a channel; channels of a tile; steps. Powers of two
  int quads;                    // fours that hold the numbers of one step's B or C
  int64_t tiles;                // of a head
  int64_t slice_tiles, slices;  // tiles of a slice, slices of a head: a block has a slice
  int64_t row_slices;           // that the rows, or those of a segment, are cut into
  int64_t batch;                // of the tensors: 1 for packed rows
  int64_t segment_l, segments;  // steps, and how many
  // Whether the forward has saved the states where segments begin. Those of packed rows are
  // computed again: their chunks end elsewhere.
  bool starts_in_chunk_states;

  GeneralBwdShape(const SelectiveScanBwdParams& p, int num_sms, bool batch_invariant);

  // Threads that add up a channel side by side, by shuffles; a channel may take several such teams.
  __host__ __device__ int team() const { return lanes < 32 ? lanes : 32; }
  __host__ __device__ int teams() const { return kThreads / team(); }
  __host__ __device__ int channel_teams() const { return lanes < 32 ? 1 : lanes / 32; }
  __host__ __device__ int64_t starts() const { return (segment_l + block_l - 1) / block_l; }
};

// The workspace. A tile's states are a quad a thread, (kThreads); all tiles of all heads are
// numbered through.
template <typename Real>
struct GeneralBwdMemory {
  using Quad = Vector<Real, GeneralBwdShape::kQuad>;

  // (segments - 1, batch, tiles): h at the end of each segment but the last
  Quad* segment_starts = nullptr;
  Quad* dstate = nullptr;             // (2, batch, tiles): from one segment to the one before
  Quad* starts;                       // (batch, starts, tiles): h where blocks of the segment begin
  Quad* sums;                         // (row_slices, tiles, 3): dA, constant dB, constant dC
  Real* channel_sums;                 // (row_slices, tiles, 2, tile_d): dD, ddelta_bias
  Quad *dB = nullptr, *dC = nullptr;  // (slices of all heads, batch, segment_l, quads)

  GeneralBwdMemory(const SelectiveScanBwdParams& p, const GeneralBwdShape& s, Scratch& scratch) {
    const int64_t tiles = p.fwd.nheads * s.tiles;
    const auto reals = [&](int64_t count, int64_t each) {
      const size_t size = Scratch::product(static_cast<size_t>(count), sizeof(Real));
      return scratch.bytes(Scratch::product(size, static_cast<size_t>(each)));
    };
    const auto states = [&](int64_t count) {
      return static_cast<Quad*>(
          reals(count, tiles * GeneralBwdShape::kThreads * GeneralBwdShape::kQuad));
    };
    if (s.segments > 1) {
      if (!s.starts_in_chunk_states) segment_starts = states((s.segments - 1) * s.batch);
      dstate = states(2 * s.batch);
    }
    starts = states(s.batch * s.starts());
    sums = states(3 * s.row_slices);
    channel_sums = static_cast<Real*>(reals(2 * s.row_slices, tiles * s.tile_d));
    const auto of_steps = [&] {
      return static_cast<Quad*>(
          reals(p.fwd.nheads * s.slices * s.batch, s.segment_l * s.quads * GeneralBwdShape::kQuad));
    };
    if (p.dB) dB = of_steps();
    if (p.dC) dC = of_steps();
  }
};

}  // namespace ssmcore::cuda
