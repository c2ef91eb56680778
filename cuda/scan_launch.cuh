// Launches of scan_kernel.cuh for one activation type.
#pragma once

#include "launch.h"
#include "scan_kernel.cuh"
#include "scan_plan.h"

namespace ssmcore::cuda {

// Whether every piece of u, Δ, z and out of a whole tile may be moved as 16 bytes of a channel, or
// as pairs of channels.
template <typename T>
bool moves_vectors(const SelectiveScanFwdParams& p, bool along_steps) {
  if (along_steps ? p.cu_seqlens || (p.chunk_states && p.chunk_size % 8 != 0) : p.headdim % 2 != 0)
    return false;
  const int64_t elements = along_steps ? kVectorSize<T> : 2;
  const int fast = along_steps ? 3 : 2;
  const int64_t sizes[] = {p.cu_seqlens ? 1 : p.rows, p.nheads, p.headdim, p.seqlen};
  for (const Strided<4>* operand : {&p.u, &p.delta, &p.z, &p.out}) {
    if (!*operand) continue;
    if (!is_aligned(operand->data, elements * sizeof(T))) return false;
    for (int i = 0; i < 4; ++i)
      if (sizes[i] > 1 && (i == fast ? operand->stride[i] != 1 : operand->stride[i] % elements))
        return false;
  }
  return true;
}

template <typename T, typename Shape, bool kAlongSteps, bool kVectors, bool kOutputs>
void launch_scan_kernel(const SelectiveScanFwdParams& p, const ScanParts& parts, const Exec& exec) {
  const int64_t blocks = (kOutputs ? parts.count : parts.count - 1) * p.rows * p.nheads *
                         ceil_div(p.headdim, Shape::kBlockD);
  constexpr size_t kSharedBytes =
      2 * sizeof(float) * Shape::kStage +
      ScanStaging<T, Shape, kAlongSteps, kVectors, kOutputs>::kSlotBytes +
      CoefficientStaging<T, Shape, kAlongSteps, kOutputs>::kSlotBytes;
  launch_kernel("selective_scan",
                selective_scan_varying_fwd_kernel<T, Shape, kAlongSteps, kVectors, kOutputs>,
                {dim3(static_cast<unsigned>(blocks)), Shape::kThreads, kSharedBytes}, exec, p,
                parts, exec.context.cuda().faults());
}

template <typename T, typename Shape, bool kOutputs>
void launch_scan(const SelectiveScanFwdParams& p, const ScanParts& parts, const Exec& exec) {
  const bool along_steps = p.u.stride[2] != 1 || p.u.stride[3] == 1;
  if (!moves_vectors<T>(p, along_steps))
    launch_scan_kernel<T, Shape, true, false, kOutputs>(p, parts, exec);
  else if (along_steps)
    launch_scan_kernel<T, Shape, true, true, kOutputs>(p, parts, exec);
  else
    launch_scan_kernel<T, Shape, false, true, kOutputs>(p, parts, exec);
}

// Tiles are shorter where elements are larger.
template <typename T, int states, int lanes, int channels, int block_l, int min_blocks,
          int staging_threads = 128>
using ShapeFor = ScanShape<states, lanes, channels, sizeof(T) < 4 ? block_l : block_l / 2,
                           min_blocks, staging_threads>;

template <typename T>
void launch_varying_scan(const SelectiveScanFwdParams& p, const ScanPlan& plan, const Exec& exec) {
  const ScanParts whole{};
  if (p.dstate > 128) return launch_scan<T, ShapeFor<T, 16, 16, 1, 16, 1>, true>(p, whole, exec);
  if (p.dstate > 64) return launch_scan<T, ShapeFor<T, 16, 8, 1, 16, 2>, true>(p, whole, exec);
  if (p.dstate > 32) return launch_scan<T, ShapeFor<T, 8, 8, 2, 16, 2>, true>(p, whole, exec);
  if (p.dstate > 16) return launch_scan<T, ShapeFor<T, 16, 2, 1, 16, 2>, true>(p, whole, exec);
  switch (plan.lanes) {
    case 1: {
      using Shape = ShapeFor<T, 16, 1, 1, 16, 2>;
      ScanParts parts{plan.parts, plan.part_length, static_cast<float2*>(exec.workspace)};
      if (p.delta_sum && plan.parts > 1)
        parts.delta_sums = reinterpret_cast<float*>(
            parts.states + (plan.parts - 1) * p.rows * p.nheads * p.headdim * p.dstate);
      if (plan.parts > 1) launch_scan<T, Shape, false>(p, parts, exec);
      return launch_scan<T, Shape, true>(p, parts, exec);
    }
    case 2:
      return launch_scan<T, ShapeFor<T, 8, 2, 1, 16, 3, 64>, true>(p, whole, exec);
    case 8:
      if (plan.crowds) return launch_scan<T, ShapeFor<T, 2, 8, 1, 32, 3, 64>, true>(p, whole, exec);
      return launch_scan<T, ShapeFor<T, 2, 8, 1, 64, 2>, true>(p, whole, exec);
    default:
      return launch_scan<T, ShapeFor<T, 1, 16, 1, 128, 1>, true>(p, whole, exec);
  }
}

}  // namespace ssmcore::cuda
