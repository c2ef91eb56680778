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
// Small problems fill the chip by more lanes, not by a split of time, which would need the decays,
// and with them the unit that limits this kernel, twice.
#include <cstdint>

#include "launch.h"
#include "scan_recurrence.cuh"
#include "scan_staging.cuh"
#include "selective_scan.h"

namespace ssmcore::cuda {
namespace {

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    selective_scan_varying_fwd_kernel(const __grid_constant__ SelectiveScanFwdParams p,
                                      uint32_t* faults) {
  extern __shared__ __align__(16) float shared[];
  const int64_t blocks_per_head = (p.headdim + Shape::kBlockD - 1) / Shape::kBlockD;
  const int64_t at = blockIdx.x / blocks_per_head;
  const int64_t first_d = blockIdx.x % blocks_per_head * Shape::kBlockD;
  const ScanBlock block{p,
                        at / p.nheads,
                        scan_row(p, at / p.nheads, faults),
                        at % p.nheads,
                        first_d,
                        static_cast<int>(min(int64_t{Shape::kBlockD}, p.headdim - first_d)),
                        p.u.stride[2] != 1 || p.u.stride[3] == 1};
  if (threadIdx.x < kScanThreads)
    ScanRecurrence<Shape>(block, shared, threadIdx.x).run();
  else if (block.along_steps)
    ScanStaging<T, Shape, true>(block, shared, threadIdx.x - kScanThreads).run();
  else
    ScanStaging<T, Shape, false>(block, shared, threadIdx.x - kScanThreads).run();
}

template <typename Shape>
int64_t blocks_of(const SelectiveScanFwdParams& p) {
  return p.rows * p.nheads * ceil_div(p.headdim, Shape::kBlockD);
}

template <typename T, typename Shape>
void launch(const SelectiveScanFwdParams& p, const Exec& exec) {
  constexpr size_t kSharedBytes =
      2 * sizeof(float) * Shape::kStage + ScanStaging<T, Shape, true>::kSlotBytes;
  launch_kernel("selective_scan", selective_scan_varying_fwd_kernel<T, Shape>,
                {dim3(static_cast<unsigned>(blocks_of<Shape>(p))), Shape::kThreads, kSharedBytes},
                exec, p, exec.context.cuda().faults());
}

// Tiles are shorter where elements are larger.
template <typename T, int lanes, int states, int block_l, int min_blocks>
using ShapeFor = ScanShape<1, states, lanes, block_l * 2 / static_cast<int>(sizeof(T) < 4 ? 2 : 4),
                           128, min_blocks>;

// How many lanes share 16 states, so that a problem takes least time on this device.
int choose_lanes(const SelectiveScanFwdParams& p, int num_sms, bool batch_invariant) {
  // What 2048 steps of a block take, in microseconds on an H100: alone on a multiprocessor, and
  // beside another.
  struct Cost {
    int lanes, block_d;
    double alone, shared;
  };
  constexpr Cost kCosts[] = {
      {1, 128, 330, 450}, {2, 64, 150, 225}, {4, 32, 100, 158}, {8, 16, 70, 125}, {16, 8, 36, 72}};
  const int64_t rows = batch_invariant ? 1 : p.rows;
  double least = 0;
  int lanes = 0;
  for (const Cost& cost : kCosts) {
    const int64_t blocks = rows * p.nheads * ceil_div(p.headdim, cost.block_d);
    const int64_t full = blocks / (2 * num_sms), rest = blocks % (2 * num_sms);
    const double time = static_cast<double>(full) * cost.shared + (rest == 0         ? 0
                                                                   : rest <= num_sms ? cost.alone
                                                                                     : cost.shared);
    if (lanes == 0 || time < least) {
      least = time;
      lanes = cost.lanes;
    }
  }
  return lanes;
}

template <typename T>
void launch_for(const SelectiveScanFwdParams& p, const Exec& exec) {
  if (p.dstate > 128) return launch<T, ShapeFor<T, 16, 16, 16, 1>>(p, exec);
  if (p.dstate > 64) return launch<T, ShapeFor<T, 8, 16, 16, 1>>(p, exec);
  if (p.dstate > 32) return launch<T, ShapeFor<T, 4, 16, 32, 1>>(p, exec);
  if (p.dstate > 16) return launch<T, ShapeFor<T, 2, 16, 32, 2>>(p, exec);
  switch (choose_lanes(p, exec.context.cuda().num_sms(), false)) {
    case 1:
      return launch<T, ShapeFor<T, 1, 16, 16, 2>>(p, exec);
    case 2:
      return launch<T, ShapeFor<T, 2, 8, 32, 2>>(p, exec);
    case 4:
      return launch<T, ShapeFor<T, 4, 4, 32, 2>>(p, exec);
    case 8:
      return launch<T, ShapeFor<T, 8, 2, 64, 2>>(p, exec);
    default:
      return launch<T, ShapeFor<T, 16, 1, 128, 1>>(p, exec);
  }
}

}  // namespace

bool is_varying_scan(const SelectiveScanFwdParams& p) {
  constexpr int64_t kMostStates = 256;
  using Narrowest = ShapeFor<float, 16, 1, 128, 1>;
  return !p.complex && p.B.data != nullptr && p.C.data != nullptr && p.dstate <= kMostStates &&
         blocks_of<Narrowest>(p) <= INT32_MAX;
}

void selective_scan_varying_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  with_type(p.dtype,
            [&](auto* type) { launch_for<std::remove_pointer_t<decltype(type)>>(p, exec); });
}

}  // namespace ssmcore::cuda
