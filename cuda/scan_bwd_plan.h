// Between selective_scan_varying_bwd.cu, which decides how the scan's backward is spread over the
// device, and scan_bwd_launch.cuh, which launches it so.
#pragma once

#include "../cpp/src/scratch.h"
#include "../cpp/src/selective_scan_params.h"

namespace ssmcore::cuda {

inline constexpr int64_t kScanBwdTile = 32;  // steps that a block has in shared memory, at most

// Channels of a block: of bfloat16, whose states take half the memory, twice as many.
constexpr int64_t scan_bwd_block_d(DType dtype) {
  return dtype == DType::bfloat16 ? 64 : 32;
}

inline constexpr size_t kScanBwdSharedBytes = 115216;  // that a block takes, at most

// Where sums that blocks leave for others lie. Channels are all those of all heads.
struct ScanBwdWorkspace {
  // Of each block of channels of each head, what it adds to dB and dC:
  // (nheads, blocks, batch, seqlen, 2, kDstate).
  float* products = nullptr;
  // (slices, parts, channels, kDstate + 2): dA, dD, ddelta_bias.
  float* channels = nullptr;
  // Of every tile, ΣΔ (tiles, channels) and the states after it (tiles, channels, dstate), in
  // chunk_states' order.
  float *tile_deltas = nullptr, *tile_states = nullptr;
  // Of every part, ΣΔ (rows, parts, channels) and what comes into it from later parts of the
  // gradient of the states at its end (rows, parts, channels, dstate).
  float *part_deltas = nullptr, *part_gradients = nullptr;
};

struct ScanBwdPlan {
  // A block works on a slice of the rows, one after the other, or on a part of one row.
  int64_t slice_rows, slices;
  int64_t part_tiles, parts;
  int64_t tile_l;              // steps of a tile: whole chunks
  int64_t chunks_per_tile;     // of chunk_states
  bool finds_states;           // chunk_states are not there, or too far apart
  int64_t row_tiles, tiles;    // of the longest possible row, and of all rows at most
  int64_t channels, blocks_d;  // of all heads, and of a head

  ScanBwdWorkspace workspace(const SelectiveScanBwdParams& p, Scratch& scratch) const;
};

// Instantiated for each activation type in a file of its own: they take long to compile.
template <typename T>
void launch_varying_scan_bwd(const SelectiveScanBwdParams& params, const ScanBwdPlan& plan,
                             const ScanBwdWorkspace& workspace, const Exec& exec);

}  // namespace ssmcore::cuda
