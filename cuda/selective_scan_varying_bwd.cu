// The backward of the selective scan with real A, and B and C that vary in time: the form that
// Mamba-1 has. Here is decided how it is spread over the device; its launches are in
// scan_bwd_launch.cuh.
#include <algorithm>

#include "launch.h"
#include "scan_bwd_plan.h"
#include "selective_scan.h"

namespace ssmcore::cuda {
namespace {

constexpr int64_t kDstate = 16;

// Parts of a row that take least time: more of them fill the device, but have to find what comes
// into them from later ones.
int64_t choose_parts(const SelectiveScanFwdParams& p, const ScanBwdPlan& plan, int num_sms,
                     bool batch_invariant) {
  if (p.cu_seqlens) return 1;
  constexpr int64_t kLeastTiles = 4, kMostParts = 64;
  // Of a tile: the time of two blocks on a multiprocessor, of one, and of its contribution.
  constexpr double kTwo = 1, kOne = 0.6, kContribution = 0.25;
  const int64_t blocks = (batch_invariant ? 1 : p.rows) * p.nheads * plan.blocks_d;
  int64_t best = 1;
  double least = 0;
  for (int64_t parts = 1; parts <= kMostParts; ++parts) {
    const int64_t tiles = ceil_div(plan.row_tiles, parts);
    if (parts > 1 && tiles < kLeastTiles) break;
    const int64_t on_one = ceil_div(blocks * ceil_div(plan.row_tiles, tiles), num_sms);
    const double time = static_cast<double>(tiles) *
                        (static_cast<double>(on_one / 2) * kTwo + (on_one % 2 ? kOne : 0)) *
                        (parts > 1 ? 1 + kContribution : 1);
    if (parts == 1 || time < least) {
      least = time;
      best = parts;
    }
  }
  return best;
}

ScanBwdPlan plan_of(const SelectiveScanBwdParams& params, const Context& context) {
  constexpr int64_t kMostSlices = 128;
  const SelectiveScanFwdParams& p = params.fwd;
  ScanBwdPlan plan{};
  plan.channels = p.nheads * p.headdim;
  plan.blocks_d = ceil_div(p.headdim, scan_bwd_block_d(p.dtype));
  plan.finds_states = !p.chunk_states || p.chunk_size > kScanBwdTile;
  plan.chunks_per_tile = plan.finds_states ? 1 : kScanBwdTile / p.chunk_size;
  plan.tile_l = plan.finds_states ? kScanBwdTile : plan.chunks_per_tile * p.chunk_size;
  plan.row_tiles = ceil_div(p.seqlen, plan.tile_l);
  plan.tiles = plan.row_tiles * (p.cu_seqlens ? 1 : p.rows) + (p.cu_seqlens ? p.rows : 0);
  const int64_t parts = choose_parts(p, plan, context.cuda().num_sms(), context.batch_invariant());
  plan.part_tiles = ceil_div(plan.row_tiles, parts);
  plan.parts =
      std::max<int64_t>(1, ceil_div(plan.row_tiles, std::max<int64_t>(1, plan.part_tiles)));
  // Parts are of one row.
  plan.slice_rows = plan.parts > 1 ? 1 : ceil_div(p.rows, kMostSlices);
  plan.slices = ceil_div(p.rows, std::max<int64_t>(1, plan.slice_rows));
  return plan;
}

}  // namespace

ScanBwdWorkspace ScanBwdPlan::workspace(const SelectiveScanBwdParams& params,
                                        Scratch& scratch) const {
  const SelectiveScanFwdParams& p = params.fwd;
  ScanBwdWorkspace workspace;
  if (params.dB || params.dC)
    workspace.products =
        scratch.floats({p.nheads, blocks_d, p.cu_seqlens ? 1 : p.rows, p.seqlen, 2 * kDstate});
  workspace.channels = scratch.floats({slices, parts, channels, kDstate + 2});
  if (finds_states) {
    workspace.tile_deltas = scratch.floats({tiles, channels});
    workspace.tile_states = scratch.floats({tiles, channels, p.dstate});
  }
  if (parts > 1) {
    workspace.part_deltas = scratch.floats({p.rows, parts, channels});
    workspace.part_gradients = scratch.floats({p.rows, parts, channels, p.dstate});
  }
  return workspace;
}

bool is_varying_scan_bwd(const SelectiveScanBwdParams& params, const Context& context) {
  const SelectiveScanFwdParams& p = params.fwd;
  if (context.cuda().shared_memory_per_block() < kScanBwdSharedBytes) return false;
  return p.dtype != DType::float64 && !p.complex && p.B && p.C && p.dstate <= kDstate;
}

size_t selective_scan_varying_bwd_workspace_size(const SelectiveScanBwdParams& params,
                                                 const Context& context) {
  Scratch scratch = Scratch::nowhere();
  plan_of(params, context).workspace(params, scratch);
  return scratch.used();
}

void selective_scan_varying_bwd(const SelectiveScanBwdParams& params, const Exec& exec) {
  const ScanBwdPlan plan = plan_of(params, exec.context);
  Scratch scratch(exec.workspace);
  const ScanBwdWorkspace workspace = plan.workspace(params, scratch);
  with_type(params.fwd.dtype, [&](auto* type) {
    launch_varying_scan_bwd<std::remove_pointer_t<decltype(type)>>(params, plan, workspace, exec);
  });
}

}  // namespace ssmcore::cuda
