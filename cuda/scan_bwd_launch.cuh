// Launches of the scan's backward for one activation type.
#pragma once

#include "launch.h"
#include "scan_bwd_carry.cuh"
#include "scan_bwd_kernel.cuh"
#include "scan_bwd_totals.cuh"

namespace ssmcore::cuda {

inline constexpr const char* kScanBwd = "selective_scan_bwd";

// Whether every piece of a whole tile may be moved as 16 bytes of a channel, or as pairs of
// channels, and int counts the elements of a tile.
template <typename T>
bool moves_vectors(const SelectiveScanBwdParams& p, const ScanBwdPlan& plan, bool along_steps) {
  const SelectiveScanFwdParams& fwd = p.fwd;
  if (along_steps ? fwd.cu_seqlens || plan.tile_l % 8 != 0 : fwd.headdim % 2 != 0) return false;
  constexpr int64_t kMostStride = int64_t{1} << 24;  // of 64 rows, an int
  const int64_t elements = along_steps ? kVectorSize<T> : 2;
  const int fast = along_steps ? 3 : 2;
  const int64_t sizes[] = {fwd.cu_seqlens ? 1 : fwd.rows, fwd.nheads, fwd.headdim, fwd.seqlen};
  const Strided<4>* operands[] = {&fwd.u, &fwd.delta, &fwd.z, &p.dout, &p.du, &p.ddelta, &p.dz};
  for (const Strided<4>* operand : operands) {
    if (!*operand) continue;
    if (!is_aligned(operand->data, elements * sizeof(T))) return false;
    for (int i = 0; i < 4; ++i)
      if (sizes[i] > 1 && (i == fast ? operand->stride[i] != 1 : operand->stride[i] % elements))
        return false;
    const int64_t within_tile = operand->stride[along_steps ? 2 : 3];
    if (within_tile < -kMostStride || within_tile > kMostStride) return false;
  }
  return true;
}

template <typename T, bool kAlongSteps, bool kGradients>
void launch_contributions(const SelectiveScanBwdParams& p, const ScanBwdPlan& plan,
                          const ScanBwdWorkspace& workspace, bool vectors, const Exec& exec) {
  // Tiles of a block: enough to spare loading its parameters again.
  constexpr int64_t kFewTiles = 8;
  const int64_t block_tiles = kGradients         ? plan.part_tiles
                              : p.fwd.cu_seqlens ? plan.row_tiles
                                                 : kFewTiles;
  const int64_t row_blocks = kGradients ? plan.parts - 1 : ceil_div(plan.row_tiles, block_tiles);
  uint32_t* const faults = exec.context.cuda().faults();
  launch_kernel(kScanBwd, scan_bwd_contributions_kernel<T, kAlongSteps, kGradients>,
                {blocks_for(p.fwd.rows * row_blocks * p.fwd.nheads * plan.blocks_d, 1),
                 ScanBwdShape<T>::kThreads, ScanBwdMemory<T>::kBytesOfStates},
                exec, p, plan, workspace, block_tiles, row_blocks, vectors, faults);
  constexpr int64_t kCarryThreads = 128;
  const int64_t blocks = p.fwd.rows * ceil_div(plan.channels * p.fwd.dstate, kCarryThreads);
  launch_kernel(kScanBwd, scan_bwd_carry_kernel<kGradients>, {blocks_for(blocks, 1), kCarryThreads},
                exec, p, plan, workspace, faults);
}

template <typename T, bool kAlongSteps>
void launch_main_pass(const SelectiveScanBwdParams& p, const ScanBwdPlan& plan,
                      const ScanBwdWorkspace& workspace, const Exec& exec) {
  const bool vectors = moves_vectors<T>(p, plan, kAlongSteps);
  if (plan.finds_states)
    launch_contributions<T, kAlongSteps, false>(p, plan, workspace, vectors, exec);
  if (plan.parts > 1) launch_contributions<T, kAlongSteps, true>(p, plan, workspace, vectors, exec);
  launch_kernel(kScanBwd, selective_scan_varying_bwd_kernel<T, kAlongSteps>,
                {blocks_for(plan.slices * plan.parts * p.fwd.nheads * plan.blocks_d, 1),
                 ScanBwdShape<T>::kThreads, ScanBwdMemory<T>::kBytes},
                exec, p, plan, workspace, vectors, exec.context.cuda().faults());
}

template <typename T>
void launch_varying_scan_bwd(const SelectiveScanBwdParams& params, const ScanBwdPlan& plan,
                             const ScanBwdWorkspace& workspace, const Exec& exec) {
  SelectiveScanBwdParams p = params;
  SelectiveScanFwdParams& fwd = p.fwd;
  if (plan.finds_states) {  // in the place of chunk_states
    Strided<5>& states = fwd.chunk_states;
    states.data = workspace.tile_states;
    states.stride[4] = 1;
    states.stride[3] = fwd.dstate;
    states.stride[2] = states.stride[3] * fwd.headdim;
    states.stride[1] = states.stride[2] * fwd.nheads;
    states.stride[0] = states.stride[1] * plan.row_tiles;
    fwd.chunk_size = plan.tile_l;
    fwd.chunks = fwd.cu_seqlens ? plan.tiles : plan.row_tiles;
  }
  if (fwd.u.stride[2] != 1 || fwd.u.stride[3] == 1)
    launch_main_pass<T, true>(p, plan, workspace, exec);
  else
    launch_main_pass<T, false>(p, plan, workspace, exec);
  const int64_t batch = fwd.cu_seqlens ? 1 : fwd.rows;
  const auto finish = [&](int which, const StridedGradient<4>& gradient, int64_t ngroups) {
    if (gradient)
      launch_kernel(kScanBwd, scan_bwd_coefficients_kernel<T>,
                    {blocks_for(batch * ngroups * ceil_div(fwd.seqlen, 16), 1), 256}, exec, p, plan,
                    workspace.products, which);
  };
  finish(0, p.dB, p.ngroups_B);
  finish(1, p.dC, p.ngroups_C);
  if (p.dA || p.dD || p.ddelta_bias)
    launch_kernel(kScanBwd, scan_bwd_channels_kernel,
                  {blocks_for(plan.channels * (ScanBwdShape<T>::kDstate + 2), 256), 256}, exec, p,
                  plan, workspace.channels);
}

}  // namespace ssmcore::cuda
