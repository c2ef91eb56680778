// The main kernel of selective_scan_varying_bwd.cu.
//
// A block takes kBlockD channels, and their rows one after the other or a part of one. It goes
// backward over the tiles of a row. Of each tile, all threads
//
//   1. load it, and leave Δ, Δu, dy, B and C in shared memory as floats;
//   2. run the recurrence forward from the state before the tile, and keep that before each span;
//   3. span by span, last first, run it forward again, now keeping the states in registers, and
//      then backward. Sums over channels, for dB and dC, are taken by the tensor cores in a warp,
//      and then by one warp after the other;
//   4. load the tile again, from the second-level cache, and store du, ddelta and dz.
//
// Two blocks a multiprocessor fill each other's waits. What blocks add to the gradients of shared
// inputs they leave in the workspace, for scan_bwd_totals.cuh to sum up in a fixed order.
//
// (Zeros multiply the states of neighbouring steps in step 3. So an infinity or NaN reaches dB and
// dC of up to three steps around its own.)
#pragma once

#include "scan_bwd_recurrence.cuh"
#include "scan_bwd_staging.cuh"

namespace ssmcore::cuda {

// Where one block of channels adds to dB and dC of a row from step t on.
__device__ __forceinline__ float* products_at(const ScanBwdBlock& block, const ScanBwdPlan& plan,
                                              float* products, int64_t t) {
  const SelectiveScanFwdParams& p = block.p.fwd;
  const int64_t batch = p.cu_seqlens.data ? 1 : p.rows;
  const int64_t at = block.head * plan.blocks_d + block.first_d / ScanBwdShape::kBlockD;
  return products + ((at * batch + block.row.batch) * p.seqlen + block.row.begin + t) * 2 *
                        ScanBwdShape::kDstate;
}

template <typename T, bool kAlongSteps>
__global__ void __launch_bounds__(ScanBwdShape::kThreads, 2)
    selective_scan_varying_bwd_kernel(const __grid_constant__ SelectiveScanBwdParams p,
                                      const __grid_constant__ ScanBwdPlan plan,
                                      const __grid_constant__ ScanBwdWorkspace workspace,
                                      bool moves_vectors, uint32_t* faults) {
  using Shape = ScanBwdShape;
  constexpr int kStates = Shape::kStates;
  extern __shared__ __align__(16) float shared[];
  const SelectiveScanFwdParams& fwd = p.fwd;
  const int64_t block_at = blockIdx.x % plan.blocks_d, head_at = blockIdx.x / plan.blocks_d;
  const int64_t part_at = head_at / fwd.nheads, part = part_at % plan.parts;
  const int64_t slice = part_at / plan.parts, first_d = block_at * Shape::kBlockD;
  ScanBwdBlock block{p, ScanBwdMemory(shared), head_at % fwd.nheads, first_d,
                     static_cast<int>(min(int64_t{Shape::kBlockD}, fwd.headdim - first_d))};
  const ScanBwdMemory& memory = block.memory;
  ScanBwdRecurrence<T, kAlongSteps> recurrence(block);
  begin_block(block);

  if (threadIdx.x < Shape::kSpans * (Shape::kWarps - 1)) memory.added(0, threadIdx.x)->init(32);
  unsigned phases = 0;  // of each span's arrivals

  const int64_t last_row = min((slice + 1) * plan.slice_rows, fwd.rows);
  for (block.row_index = slice * plan.slice_rows; block.row_index < last_row; ++block.row_index) {
    block.row = scan_row(fwd, block.row_index, faults);
    begin_row(block);
    __syncthreads();
    const int64_t length = block.row.end - block.row.begin;
    if (plan.parts > 1) {
      const int64_t at = (block.row_index * plan.parts + part) * plan.channels;
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        recurrence.dh[i] =
            recurrence.exists(block, i)
                ? workspace.part_gradients[(at + block.channel(recurrence.d)) * fwd.dstate +
                                           recurrence.first_n + i]
                : 0.0f;
    } else {
      recurrence.load_state(recurrence.dh, p.dlast_state, block);
    }
    const int64_t first_state = first_chunk_of_row(fwd, block.row_index) - 1;
    const int64_t first_tile = part * plan.part_tiles;
    const int64_t tiles = min(first_tile + plan.part_tiles, pieces_of(length, plan.tile_l));
    for (int64_t tile = tiles - 1; tile >= first_tile; --tile) {
      const int64_t t = tile * plan.tile_l;
      const int steps = static_cast<int>(min(plan.tile_l, length - t));
      float h[kStates];
      if (tile == 0) {
        recurrence.load_state(h, fwd.initial_state, block);
      } else {
        const Strided<5>& states = fwd.chunk_states;
        const int64_t chunk = first_state + tile * plan.chunks_per_tile;
        recurrence.load(h, states,
                        chunk < fwd.chunks
                            ? static_cast<const float*>(states.data) +
                                  block.row.batch * states.stride[0] + chunk * states.stride[1]
                            : nullptr,
                        block);
      }
      const ScanBwdTile<T, kAlongSteps> staged{p, memory, block.channels, steps, t};
      staged.template stage<ScanBwdUse::all>(moves_vectors);
      stage_coefficients<T, kAlongSteps, ScanBwdUse::all>(block, t, steps);
      __syncthreads();
      const int spans = (steps + Shape::kSpan - 1) / Shape::kSpan;
      recurrence.find_starts(h, spans);
      float* const products = products_at(block, plan, workspace.products, t);
#pragma unroll 1
      for (int span = spans - 1; span >= 0; --span) {
        auto of_span = recurrence.run_span(span);
        if (workspace.products)
          recurrence.add_products(of_span, span, phases,
                                  products + span * Shape::kSpan * 2 * Shape::kDstate,
                                  steps - span * Shape::kSpan);
      }
      phases ^= (1u << spans) - 1;
      __syncthreads();
      staged.finish(moves_vectors);
      __syncthreads();
    }
    if (part == 0 && p.dinitial_state.data && block.row.slot >= 0) {
      const StridedGradient<4>& to = p.dinitial_state;
      float* const states = static_cast<float*>(to.data) + block.row.slot * to.stride[0];
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        if (recurrence.exists(block, i)) {
          float* const at = recurrence.at(to, states, block, i);
          *at = recurrence.dh[i] + (to.accumulate ? *at : 0.0f);
        }
    }
  }
  float* const sums =
      workspace.channels + (slice * plan.parts + part) * plan.channels * (Shape::kDstate + 2);
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    if (recurrence.d < block.channels)
      sums[block.channel(recurrence.d) * (Shape::kDstate + 2) + recurrence.first_n + i] =
          recurrence.dA[i];
  store_thread_sums<ScanBwdTile<T, kAlongSteps>>(block, sums);
}

}  // namespace ssmcore::cuda
