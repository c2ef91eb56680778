// The kernel of selective_scan_varying_fwd.cu.
//
// A block takes kBlockD channels of one row. Its time is cut into tiles of kBlockL steps, which
// pass through three stages, a barrier apart:
//
//   1. Threads of their own load a tile, and leave Δ, Δu, B and C in shared memory as floats.
//   2. kScanThreads threads run the recurrence, serially in time. The states of kChannels channels
//      are spread over kLanes neighbouring threads. These leave what adds up to y: each of two
//      lanes its own, more of them a sum for every four.
//   3. The threads of stage 1 sum that, add D u, gate with z and store the tile.
//
// Stages 1 and 3 of the tiles around it overlap with stage 2: they wait for memory, it does not.
// Shared memory holds rows of channels or states by steps, so that four steps are read at once.
//
// Small problems fill the chip by more lanes. Where channels are so few, and time so long, that a
// row is cut into parts nevertheless, the same kernel first finds each part's states, from its end
// backwards until the decay is complete. (So a NaN reaches the end of its part, but may not go
// beyond it.)
#pragma once

#include "scan_recurrence.cuh"
#include "scan_staging.cuh"

namespace ssmcore::cuda {

// Stages 1 and 3 of all tiles.
template <typename T, typename Shape, bool kAlongSteps, bool kVectors>
__device__ __forceinline__ void stage_tiles(const ScanBlock& block, float* shared, int thread) {
  ScanStaging<T, Shape, kAlongSteps, kVectors, true> staging(block, shared, thread);
  CoefficientStaging<T, Shape, kAlongSteps, true> coefficients(block, staging.slots_end(shared),
                                                               thread);
  Tiles tiles = block.tiles();
  int before = 0, steps = 0, next = tiles.next<Shape::kBlockL>();
  staging.begin(0, next);
  coefficients.begin(0, next);
  commit_copies();
  // The recurrence is at tile number `tile`, of `steps`, or has yet to begin or just ended.
  for (int tile = -1; tile < 0 || steps + before > 0; ++tile) {
    float* stage = shared + (tile & 1 ? 0 : Shape::kStage);
    const int after = tiles.next<Shape::kBlockL>();
    staging.begin(tile + 2, after);
    coefficients.begin(tile + 2, after);
    commit_copies();
    staging.finish(stage, tile - 1, before);
    wait_for_copies<1>();
    if (next > 0) coefficients.convert(stage, tile + 1);
    staging.convert(stage, tile + 1, next);
    if (next + steps > 0) scan_barrier<Shape::kThreads>();
    before = steps;
    steps = next;
    next = after;
  }
}

// Stage 1 of the tiles of a part, last first; ends when the recurrence has no use for more.
template <typename T, typename Shape, bool kAlongSteps, bool kVectors>
__device__ __forceinline__ void stage_tiles_for_states(const ScanBlock& block, float* shared,
                                                       int thread, int tiles) {
  ScanStaging<T, Shape, kAlongSteps, kVectors, false> staging(block, shared, thread);
  CoefficientStaging<T, Shape, kAlongSteps, false> coefficients(block, staging.slots_end(shared),
                                                                thread);
  staging.begin(0, Shape::kBlockL);
  coefficients.begin(0, Shape::kBlockL);
  commit_copies();
  for (int tile = 0; tile < tiles; ++tile) {
    float* stage = shared + tile % 2 * Shape::kStage;
    const int next = tile + 1 < tiles ? Shape::kBlockL : 0;
    staging.begin(tile + 1, next);
    coefficients.begin(tile + 1, next);
    commit_copies();
    wait_for_copies<1>();
    coefficients.convert(stage, tile);
    staging.convert(stage, tile, Shape::kBlockL);
    if (!scan_barrier_or<Shape::kThreads>(false)) break;
  }
  wait_for_copies<0>();
}

template <typename T, typename Shape, bool kAlongSteps, bool kVectors, bool kOutputs>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    selective_scan_varying_fwd_kernel(const __grid_constant__ SelectiveScanFwdParams p,
                                      const __grid_constant__ ScanParts parts, uint32_t* faults) {
  extern __shared__ __align__(16) float shared[];
  const int64_t blocks_per_head = (p.headdim + Shape::kBlockD - 1) / Shape::kBlockD;
  const int64_t head_at = blockIdx.x / blocks_per_head, row_at = head_at / p.nheads;
  const int64_t first_d = blockIdx.x % blocks_per_head * Shape::kBlockD;
  ScanBlock block{p,
                  parts,
                  row_at / p.rows,
                  row_at % p.rows,
                  scan_row(p, row_at % p.rows, faults),
                  head_at % p.nheads,
                  first_d,
                  static_cast<int>(min(int64_t{Shape::kBlockD}, p.headdim - first_d))};
  if (parts.count > 1) {
    block.row.begin = block.part * parts.length;
    block.row.end = min(block.row.begin + parts.length, p.seqlen);
  }
  const bool stages = threadIdx.x >= Shape::kScanThreads;
  const int thread = threadIdx.x - (stages ? Shape::kScanThreads : 0);
  if constexpr (kOutputs) {
    if (!stages)
      ScanRecurrence<Shape, kAlongSteps>(block, shared, thread).run();
    else
      stage_tiles<T, Shape, kAlongSteps, kVectors>(block, shared, thread);
  } else {
    const int tiles = static_cast<int>(parts.length / Shape::kBlockL);
    if (!stages)
      ScanRecurrence<Shape, kAlongSteps>(block, shared, thread).run_states(tiles);
    else
      stage_tiles_for_states<T, Shape, kAlongSteps, kVectors>(block, shared, thread, tiles);
  }
}

}  // namespace ssmcore::cuda
