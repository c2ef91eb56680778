// The selective scan with real A, and B and C that vary in time: the form that Mamba has.
//
// A block takes kBlockD channels of one row. Its time is cut into tiles of kBlockL steps, which
// pass through three stages, a barrier apart:
//
//   1. Threads of their own load a tile, and leave Δ, Δu, B and C in shared memory as floats.
//   2. kScanThreads threads run the recurrence, serially in time. A channel's states are spread
//      over kLanes neighbouring threads. They leave what each lane adds to y.
//   3. The threads of stage 1 sum what the lanes left, add D u, gate with z and store the tile.
//
// Stages 1 and 3 of the tiles around it overlap with stage 2: they wait for memory, it does not.
// Shared memory holds rows of channels or states by steps, so that four steps are read at once.
//
// Small problems fill the chip by more lanes. Where channels are so few, and time so long, that a
// row is cut into parts nevertheless, the same kernel first finds each part's states, from its end
// backwards until the decay is complete. (So a NaN reaches the end of its part, but may not go
// beyond it.)
#include <cstdint>

#include "launch.h"
#include "scan_recurrence.cuh"
#include "scan_staging.cuh"
#include "selective_scan.h"

namespace ssmcore::cuda {
namespace {

template <typename T, typename Shape, bool kOutputs>
__global__ void __launch_bounds__(kScanThreads + kStagingThreads, Shape::kMinBlocks)
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
                  static_cast<int>(min(int64_t{Shape::kBlockD}, p.headdim - first_d)),
                  p.u.stride[2] != 1 || p.u.stride[3] == 1};
  if (parts.count > 1) {
    block.row.begin = block.part * parts.length;
    block.row.end = min(block.row.begin + parts.length, p.seqlen);
  }
  const int thread = threadIdx.x % kScanThreads;
  if constexpr (kOutputs) {
    if (threadIdx.x < kScanThreads)
      ScanRecurrence<Shape>(block, shared, thread).run();
    else if (block.along_steps)
      ScanStaging<T, Shape, true, true>(block, shared, thread).run();
    else
      ScanStaging<T, Shape, false, true>(block, shared, thread).run();
  } else {
    const int tiles = static_cast<int>(parts.length / Shape::kBlockL);
    if (threadIdx.x < kScanThreads)
      ScanRecurrence<Shape>(block, shared, thread).run_states(tiles);
    else if (block.along_steps)
      ScanStaging<T, Shape, true, false>(block, shared, thread).run_states(tiles);
    else
      ScanStaging<T, Shape, false, false>(block, shared, thread).run_states(tiles);
  }
}

template <typename Shape>
int64_t blocks_of(const SelectiveScanFwdParams& p) {
  return p.rows * p.nheads * ceil_div(p.headdim, Shape::kBlockD);
}

template <typename T, typename Shape, bool kOutputs>
void launch(const SelectiveScanFwdParams& p, const ScanParts& parts, const Exec& exec) {
  constexpr size_t kSharedBytes =
      2 * sizeof(float) * Shape::kStage + ScanStaging<T, Shape, true, kOutputs>::kSlotBytes;
  const int64_t parts_run = kOutputs ? parts.count : parts.count - 1;
  launch_kernel("selective_scan", selective_scan_varying_fwd_kernel<T, Shape, kOutputs>,
                {dim3(static_cast<unsigned>(parts_run * blocks_of<Shape>(p))),
                 kScanThreads + kStagingThreads, kSharedBytes},
                exec, p, parts, exec.context.cuda().faults());
}

template <typename T, typename Shape>
void launch_whole(const SelectiveScanFwdParams& p, const Exec& exec) {
  launch<T, Shape, true>(p, ScanParts{}, exec);
}

// Tiles are shorter where elements are larger.
template <typename T, int lanes, int states, int block_l, int min_blocks>
using ShapeFor = ScanShape<states, lanes, sizeof(T) < 4 ? block_l : block_l / 2, min_blocks>;

// How a problem of at most 16 states is spread over the device.
struct ScanPlan {
  int lanes;  // of a channel
  int64_t parts, part_length;
};

// The plan that takes least time, by what blocks took on an H100.
ScanPlan choose_plan(const SelectiveScanFwdParams& p, int num_sms, bool batch_invariant) {
  // Nanoseconds that a step takes a block alone on a multiprocessor, and each of several.
  struct Cost {
    int lanes, block_d;
    double alone, shared;
  };
  constexpr Cost kCosts[] = {
      {1, 128, 160, 110}, {2, 64, 74, 61}, {4, 32, 48, 38.5}, {8, 16, 34, 30.5}, {16, 8, 17, 17}};
  // To find the states of a part takes so much of what its outputs do.
  constexpr double kStatesCost = 0.8;
  constexpr int64_t kLeastPart = 2048, kMostParts = 128;
  const int64_t rows = batch_invariant ? 1 : p.rows;
  ScanPlan best{};
  double least = 0;
  const auto consider = [&](const Cost& cost, int64_t parts) {
    const int64_t length = ceil_div(ceil_div(p.seqlen, parts), kLeastPart) * kLeastPart;
    parts = ceil_div(p.seqlen, length);
    const int64_t blocks = rows * p.nheads * ceil_div(p.headdim, cost.block_d) * parts;
    const int64_t on_one = ceil_div(blocks, num_sms);
    const double time = static_cast<double>(std::min(length, p.seqlen)) *
                        (parts > 1 ? 1 + kStatesCost : 1) *
                        (on_one == 1 ? cost.alone : static_cast<double>(on_one) * cost.shared);
    if (best.lanes == 0 || time < least) {
      least = time;
      best = {cost.lanes, parts, length};
    }
  };
  for (const Cost& cost : kCosts) consider(cost, 1);
  if (!p.cu_seqlens && !p.delta_sum && !p.chunk_states)
    for (int64_t parts = 2; parts <= kMostParts; ++parts) consider(kCosts[0], parts);
  return best;
}

ScanPlan plan_of(const SelectiveScanFwdParams& p, const Context& context) {
  if (p.dstate > 16) return {};
  return choose_plan(p, context.cuda().num_sms(), context.batch_invariant());
}

template <typename T>
void launch_for(const SelectiveScanFwdParams& p, const Exec& exec) {
  if (p.dstate > 128) return launch_whole<T, ShapeFor<T, 16, 16, 16, 1>>(p, exec);
  if (p.dstate > 64) return launch_whole<T, ShapeFor<T, 8, 16, 16, 2>>(p, exec);
  if (p.dstate > 32) return launch_whole<T, ShapeFor<T, 4, 16, 16, 2>>(p, exec);
  if (p.dstate > 16) return launch_whole<T, ShapeFor<T, 2, 16, 16, 2>>(p, exec);
  const ScanPlan plan = plan_of(p, exec.context);
  switch (plan.lanes) {
    case 1: {
      using Shape = ShapeFor<T, 1, 16, 16, 2>;
      const ScanParts parts{plan.parts, plan.part_length, static_cast<float2*>(exec.workspace)};
      if (plan.parts > 1) launch<T, Shape, false>(p, parts, exec);
      return launch<T, Shape, true>(p, parts, exec);
    }
    case 2:
      return launch_whole<T, ShapeFor<T, 2, 8, 32, 2>>(p, exec);
    case 4:
      return launch_whole<T, ShapeFor<T, 4, 4, 32, 2>>(p, exec);
    case 8:
      return launch_whole<T, ShapeFor<T, 8, 2, 64, 2>>(p, exec);
    default:
      return launch_whole<T, ShapeFor<T, 16, 1, 128, 1>>(p, exec);
  }
}

}  // namespace

bool is_varying_scan(const SelectiveScanFwdParams& p) {
  constexpr int64_t kMostStates = 256;
  using Narrowest = ShapeFor<float, 16, 1, 128, 1>;
  return !p.complex && p.B.data != nullptr && p.C.data != nullptr && p.dstate <= kMostStates &&
         blocks_of<Narrowest>(p) <= INT32_MAX;
}

size_t selective_scan_varying_fwd_workspace_size(const SelectiveScanFwdParams& p,
                                                 const Context& context) {
  const ScanPlan plan = plan_of(p, context);
  if (plan.parts <= 1) return 0;
  return static_cast<size_t>((plan.parts - 1) * p.rows * p.nheads * p.headdim * p.dstate) *
         sizeof(float2);
}

void selective_scan_varying_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  with_type(p.dtype,
            [&](auto* type) { launch_for<std::remove_pointer_t<decltype(type)>>(p, exec); });
}

}  // namespace ssmcore::cuda
