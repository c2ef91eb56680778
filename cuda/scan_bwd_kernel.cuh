// The main kernel of selective_scan_varying_bwd.cu.
//
// A block takes kBlockD channels, and their rows one after the other or a part of one. It goes
// backward over the tiles of a row. Of each tile
//
//   1. all threads load it, and leave Δ, Δu, dy, B and C in shared memory as floats;
//   2. they run the recurrence forward from the states before the tile, and leave the states;
//   3. the tensor cores sum up y and what the block adds to dC, and dz is stored;
//   4. the recurrence runs backward, and leaves the gradients of the states in their place;
//   5. the tensor cores sum up the gradient of Δu and what the block adds to dB, and du and ddelta
//      are stored.
//
// Two blocks a multiprocessor fill each other's waits. What blocks add to the gradients of shared
// inputs they leave in the workspace, for scan_bwd_totals.cuh to sum up in a fixed order.
#pragma once

#include "scan_bwd_recurrence.cuh"
#include "scan_bwd_staging.cuh"
#include "scan_bwd_sums.cuh"

namespace ssmcore::cuda {

template <typename T, bool kAlongSteps>
__global__ void __launch_bounds__(ScanBwdShape<T>::kThreads, 2)
    selective_scan_varying_bwd_kernel(const __grid_constant__ SelectiveScanBwdParams p,
                                      const __grid_constant__ ScanBwdPlan plan,
                                      const __grid_constant__ ScanBwdWorkspace workspace,
                                      bool moves_vectors, uint32_t* faults) {
  using Shape = ScanBwdShape<T>;
  using Tile = ScanBwdTile<T, kAlongSteps>;
  constexpr int kStates = Shape::kStates;
  extern __shared__ __align__(16) float shared[];
  const SelectiveScanFwdParams& fwd = p.fwd;
  const int64_t block_at = blockIdx.x % plan.blocks_d, head_at = blockIdx.x / plan.blocks_d;
  const int64_t part_at = head_at / fwd.nheads, part = part_at % plan.parts;
  const int64_t slice = part_at / plan.parts, first_d = block_at * Shape::kBlockD;
  const ScanBwdBlock<T> block{
      p, ScanBwdMemory<T>(shared), head_at % fwd.nheads, first_d,
      static_cast<int>(min(int64_t{Shape::kBlockD}, fwd.headdim - first_d))};
  const ScanBwdMemory<T>& memory = block.memory;
  ScanBwdRecurrence<T, kAlongSteps> recurrence(block);
  const ScanBwdSums<T> sums(memory);
  const ScanBwdScales<T> scales(memory);
  begin_block(block);
  ScanBwdBounds::reset(memory, true);
  __syncthreads();
  ScanBwdBounds of_A;
  for (const float A : recurrence.A) of_A.include(ScanBwdBound::A, fmaxf(A, 0.0f));
  of_A.store(memory);

  const int64_t last_row = min((slice + 1) * plan.slice_rows, fwd.rows);
  for (int64_t row_index = slice * plan.slice_rows; row_index < last_row; ++row_index) {
    const ScanRow row = scan_row(fwd, row_index, faults);
    const int64_t first_state = first_chunk_of_row(fwd, row_index) - 1;
    const int64_t length = row.end - row.begin;
    // Beyond chunk_states are those of rows that were reported.
    const int64_t chunks_after = max(int64_t{0}, fwd.chunks - 1 - first_state);
    const int64_t row_tiles =
        min(pieces_of(length, plan.tile_l), 1 + chunks_after / plan.chunks_per_tile);
    const int64_t first_tile = part * plan.part_tiles;
    const int tiles = static_cast<int>(min(first_tile + plan.part_tiles, row_tiles));
    const int tile_l = static_cast<int>(plan.tile_l);
    __syncthreads();  // all are done with the row before
    begin_row(block, plan, row, first_state, tiles - 1, -1);
    begin_products(block, plan, row, workspace.products, tiles - 1, -1);
    if (threadIdx.x == 0) {
      memory.steps() = static_cast<int>(min(plan.tile_l, length - (tiles - 1) * plan.tile_l));
      memory.last_tile() = static_cast<int>(first_tile);
    }
    __syncthreads();
    const auto tile_of = [&](int steps) {
      return Tile{p, memory, block.channels, steps, moves_vectors && steps == Shape::kTile};
    };
    if (plan.parts > 1) {
      const int64_t at =
          ((row_index * plan.parts + part) * plan.channels + block.channel(recurrence.d)) *
              fwd.dstate +
          recurrence.first_n;
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        recurrence.dh[i] = recurrence.exists(block, i) ? workspace.part_gradients[at + i] : 0.0f;
    } else {
      recurrence.load_state(recurrence.dh, block, p.dlast_state, row.slot);
    }
    typename Tile::Inputs inputs;
    ScanBwdCoefficients<T, kAlongSteps, ScanBwdUse::all> coefficients;
    float h[kStates];  // before the tile
    const auto load = [&](int tile, int steps) {
      inputs = tile_of(steps).template load<ScanBwdUse::all>();
      coefficients.load(fwd, memory, steps);
      if (tile == 0) {
        recurrence.load_state(h, block, fwd.initial_state, row.slot);
      } else {
        const char* const states = memory.place(ScanBwdOperand::states).at;
        recurrence.load(h, block, reinterpret_cast<const float*>(states), fwd.chunk_states);
      }
    };
    if (tiles > first_tile) load(tiles - 1, memory.steps());
    for (int tile = tiles - 1; tile >= memory.last_tile(); --tile) {
      const int steps = memory.steps();
      ScanBwdBounds bounds;
      tile_of(steps).template stage<ScanBwdUse::all>(inputs, bounds);
      coefficients.stage(memory, bounds);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        bounds.include(ScanBwdBound::states, h[i]);
        bounds.include(ScanBwdBound::gradients, recurrence.dh[i]);
      }
      bounds.store(memory);
      __syncthreads();
      memory.advance(tile_l);
      const int whole_steps = ScanBwdSums<T>::whole(steps);
      const float state_scale = scales.states(), gradient_scale = scales.gradients();
      recurrence.run_forward(h, whole_steps, state_scale);
      __syncthreads();
      float* const products =
          workspace.products ? reinterpret_cast<float*>(memory.place(ScanBwdOperand::products).at)
                             : nullptr;
      sums.take(steps, state_scale, fwd.z.data,
                {memory.coefficients(1, 0), scales.of(ScanBwdBound::C)},
                {memory.dy(0), scales.of(ScanBwdBound::dy)},
                products ? products + Shape::kDstate : nullptr);
      __syncthreads();
      float dy[8];
      tile_of(steps).finish_gate(inputs, dy);
      recurrence.run_backward(whole_steps, state_scale, gradient_scale);
      __syncthreads();
      sums.take(steps, gradient_scale, true,
                {memory.coefficients(0, 0), scales.of(ScanBwdBound::B)},
                {memory.delta_u(0), scales.of(ScanBwdBound::delta_u)}, products);
      __syncthreads();
      ScanBwdBounds::reset(memory, false);
      const typename Tile::Piece u = inputs.u;
      if (tile > memory.last_tile())
        load(tile - 1, tile_l);  // under way while this one is finished
      tile_of(steps).finish(u, dy);
      __syncthreads();
    }
    if (part == 0 && p.dinitial_state.data && row.slot >= 0) {
      const StridedGradient<4>& to = p.dinitial_state;
      float* const states =
          recurrence.of_block(to, static_cast<float*>(to.data) + row.slot * to.stride[0], block);
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        if (recurrence.exists(block, i)) {
          float* const at = recurrence.at(to, states, i);
          *at = recurrence.dh[i] + (to.accumulate ? *at : 0.0f);
        }
    }
  }
  float* const of_channels =
      workspace.channels + (slice * plan.parts + part) * plan.channels * (Shape::kDstate + 2);
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    if (recurrence.d < block.channels)
      of_channels[block.channel(recurrence.d) * (Shape::kDstate + 2) + recurrence.first_n + i] =
          recurrence.dA[i];
  store_sums<T, kAlongSteps>(block, of_channels);
}

}  // namespace ssmcore::cuda
