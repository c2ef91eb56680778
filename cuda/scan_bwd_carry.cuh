// What crosses the borders of tiles and parts in the backward of the scan, where it is not given:
// states (forward) and their gradients (backward). First every tile, or part, finds its own
// contribution and ΣΔ, side by side; then the contributions are added up one after the other.
#pragma once

#include "scan_bwd_recurrence.cuh"
#include "scan_bwd_staging.cuh"

namespace ssmcore::cuda {

// Adds to `sums`, in order of time or against it, exp(A ΣΔ) x K: of the states at the end, over
// later steps, Δu B; of the gradients at the beginning, up to and with the step, dy C.
template <bool kGradients, typename States, typename T>
__device__ __forceinline__ void add_contributions(const States& states,
                                                  const ScanBwdMemory<T>& memory, int steps,
                                                  float& deltas, float (&sums)[States::kStates]) {
  const int fours = (steps + 3) / 4;
  const float* const x = kGradients ? memory.dy(states.row) : memory.delta_u(states.row);
#pragma unroll 2
  for (int four = 0; four < fours; ++four) {
    const int t = 4 * (kGradients ? four : fours - 1 - four);
    const Four dt = load_four(memory.delta(states.row) + t), x_t = load_four(x + t);
    float before[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = kGradients ? i : 3 - i;
      if (kGradients) deltas += dt.value[j];
      before[j] = deltas;
      if (!kGradients) deltas += dt.value[j];
    }
#pragma unroll
    for (int i = 0; i < States::kStates; ++i) {
      const Four K = load_four(memory.coefficients(kGradients, states.first_n + i) + t);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sums[i] += exp2_approx(before[j] * states.A[i]) * (x_t.value[j] * K.value[j]);
    }
  }
}

// kGradients: a block finds what one part, but for the first, adds to the gradients of the states
// before it, until the decay is complete. Otherwise: what each of `block_tiles` tiles adds to the
// states after it.
template <typename T, bool kAlongSteps, bool kGradients>
__global__ void __launch_bounds__(ScanBwdShape<T>::kThreads, 768 / ScanBwdShape<T>::kThreads)
    scan_bwd_contributions_kernel(const __grid_constant__ SelectiveScanBwdParams p,
                                  const __grid_constant__ ScanBwdPlan plan,
                                  const __grid_constant__ ScanBwdWorkspace workspace,
                                  int64_t block_tiles, int64_t row_blocks, bool moves_vectors,
                                  uint32_t* faults) {
  using Shape = ScanBwdShape<T>;
  extern __shared__ __align__(16) float shared[];
  const SelectiveScanFwdParams& fwd = p.fwd;
  const int64_t head_at = blockIdx.x / plan.blocks_d, row_at = head_at / fwd.nheads;
  const int64_t first_d = blockIdx.x % plan.blocks_d * Shape::kBlockD;
  const ScanBwdBlock<T> block{
      p, ScanBwdMemory<T>(shared), head_at % fwd.nheads, first_d,
      static_cast<int>(min(int64_t{Shape::kBlockD}, fwd.headdim - first_d))};
  const int64_t row_index = row_at / row_blocks;
  const ScanRow row = scan_row(fwd, row_index, faults);
  begin_block(block);
  const int64_t part = row_at % row_blocks + kGradients, length = row.end - row.begin;
  const int64_t first_tile = part * block_tiles;
  const int64_t end_tile = min(first_tile + block_tiles, pieces_of(length, plan.tile_l));
  begin_row(block, plan, row, 0, first_tile, 1);
  __syncthreads();
  const ScanBwdStates<T, kAlongSteps> states(block);

  // Of the first tile, or of the part.
  const int64_t first_entry =
      kGradients ? row_index * plan.parts + part
                 : first_chunk_of_row(fwd, row_index) +
                       (fwd.cu_seqlens.data ? 0 : row_index * plan.row_tiles) + first_tile;
  float* const all_deltas = kGradients ? workspace.part_deltas : workspace.tile_deltas;
  float* const all_sums = kGradients ? workspace.part_gradients : workspace.tile_states;
  const auto store = [&](int64_t entry, float deltas, const float (&sums)[Shape::kStates]) {
    if (states.d >= block.channels || (!kGradients && entry >= plan.tiles)) return;
    const int64_t at = entry * plan.channels + block.channel(states.d);
    if (states.quarter == 0) all_deltas[at] = deltas;
#pragma unroll
    for (int i = 0; i < Shape::kStates; ++i)
      if (states.exists(block, i)) all_sums[at * fwd.dstate + states.first_n + i] = sums[i];
  };

  float deltas = 0, sums[Shape::kStates] = {};
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int steps = static_cast<int>(min(plan.tile_l, length - tile * plan.tile_l));
    constexpr ScanBwdUse kUse = kGradients ? ScanBwdUse::gradients : ScanBwdUse::states;
    const ScanBwdTile<T, kAlongSteps> staged{p, block.memory, block.channels, steps,
                                             moves_vectors && steps == Shape::kTile};
    ScanBwdCoefficients<T, kAlongSteps, kUse> coefficients;
    coefficients.load(fwd, block.memory, steps);
    ScanBwdBounds bounds;  // not needed
    staged.template stage<kUse>(staged.template load<kUse>(), bounds);
    coefficients.stage(block.memory, bounds);
    __syncthreads();
    block.memory.advance(0);
    add_contributions<kGradients>(states, block.memory, steps, deltas, sums);
    float left = 0;  // of a gradient that comes from after this tile
    if (kGradients) {
#pragma unroll
      for (int i = 0; i < Shape::kStates; ++i)
        left += states.exists(block, i) ? exp2_approx(deltas * states.A[i]) : 0.0f;
    } else {
      store(first_entry + tile - first_tile, deltas, sums);
      deltas = 0;
#pragma unroll
      for (float& sum : sums) sum = 0;
    }
    if (!__syncthreads_or(!kGradients || left != 0)) break;
  }
  if (kGradients) store(first_entry, deltas, sums);
}

// A thread has one state of one channel of one row.
template <bool kGradients>
__global__ void __launch_bounds__(128)
    scan_bwd_carry_kernel(const __grid_constant__ SelectiveScanBwdParams p,
                          const __grid_constant__ ScanBwdPlan plan,
                          const __grid_constant__ ScanBwdWorkspace workspace, uint32_t* faults) {
  constexpr int kAhead = 8;  // entries whose loads are under way
  const SelectiveScanFwdParams& fwd = p.fwd;
  const int64_t of_row = plan.channels * fwd.dstate;
  const int64_t blocks_of_row = pieces_of(of_row, blockDim.x);
  const int64_t row_index = blockIdx.x / blocks_of_row;
  const ScanRow row = scan_row(fwd, row_index, faults);
  const int64_t first_tile = kGradients ? 0 : first_chunk_of_row(fwd, row_index);
  const int64_t at = blockIdx.x % blocks_of_row * blockDim.x + threadIdx.x;
  if (at >= of_row) return;
  const int64_t n = at % fwd.dstate, channel = at / fwd.dstate;
  const int64_t head = channel / fwd.headdim, d = channel % fwd.headdim;
  const float A =
      static_cast<const float*>(
          fwd.A.data)[head * fwd.A.stride[0] + d * fwd.A.stride[1] + n * fwd.A.stride[2]] *
      kLog2e;
  const Strided<4>& from = kGradients ? p.dlast_state : fwd.initial_state;
  float carry =
      from.data && row.slot >= 0
          ? static_cast<const float*>(from.data)[row.slot * from.stride[0] + head * from.stride[1] +
                                                 d * from.stride[2] + n * from.stride[3]]
          : 0.0f;

  const int64_t first = kGradients
                            ? row_index * plan.parts
                            : first_tile + (fwd.cu_seqlens.data ? 0 : row_index * plan.row_tiles);
  const int64_t count = kGradients
                            ? plan.parts
                            : min(pieces_of(row.end - row.begin, plan.tile_l), plan.tiles - first);
  const float* const deltas =
      (kGradients ? workspace.part_deltas : workspace.tile_deltas) + channel;
  float* const sums = (kGradients ? workspace.part_gradients : workspace.tile_states) + at;
  for (int64_t done = 0; done < count; done += kAhead) {
    float decay[kAhead], sum[kAhead];
    // Entry i from here on; the first part has no contribution of its own that anything needs.
    const auto entry = [&](int i) {
      return first + (kGradients ? count - 1 - done - i : done + i);
    };
    const auto has_sum = [&](int i) { return done + i < (kGradients ? count - 1 : count); };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      decay[i] = has_sum(i) ? exp2_approx(deltas[entry(i) * plan.channels] * A) : 0.0f;
      sum[i] = has_sum(i) ? sums[entry(i) * of_row] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (done + i >= count) break;
      if (kGradients) sums[entry(i) * of_row] = carry;
      carry = decay[i] * carry + sum[i];
      if (!kGradients) sums[entry(i) * of_row] = carry;
    }
  }
}

}  // namespace ssmcore::cuda
