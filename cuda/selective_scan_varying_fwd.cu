// The selective scan with real A, and B and C that vary in time: the form that Mamba has. Here is
// decided how it is spread over the device; the kernel is in scan_kernel.cuh.
#include <cstdint>
#include <numeric>

#include "launch.h"
#include "scan_plan.h"
#include "selective_scan.h"

namespace ssmcore::cuda {
namespace {

// The plan that takes least time, by what blocks took on an H100.
ScanPlan choose_plan(const SelectiveScanFwdParams& p, int num_sms, bool batch_invariant) {
  // Nanoseconds that a step takes a block alone on a multiprocessor, and each of several.
  struct Cost {
    int lanes, block_d;
    double alone, shared;
  };
  constexpr Cost kCosts[] = {
      {1, 128, 160, 112}, {2, 64, 74, 57}, {8, 16, 28.5, 24}, {16, 8, 21.5, 21.5}};
  // To find the states of a part takes so much of what its outputs do.
  constexpr double kStatesCost = 0.75;
  constexpr int64_t kLeastPart = 2048, kMostParts = 128;
  // Parts are whole tiles, of 16 steps at most, and whole chunks.
  const int64_t chunk =
      p.chunk_states ? std::lcm(std::min(p.chunk_size, p.seqlen), int64_t{16}) : 16;
  const int64_t unit = ceil_div(kLeastPart, chunk) * chunk;
  const int64_t rows = batch_invariant ? 1 : p.rows;
  ScanPlan best{};
  double least = 0;
  const auto consider = [&](const Cost& cost, int64_t parts) {
    const int64_t length = ceil_div(ceil_div(p.seqlen, parts), unit) * unit;
    parts = ceil_div(p.seqlen, length);
    const int64_t blocks = rows * p.nheads * ceil_div(p.headdim, cost.block_d) * parts;
    const int64_t on_one = ceil_div(blocks, num_sms);
    const double time = static_cast<double>(std::min(length, p.seqlen)) *
                        (parts > 1 ? 1 + kStatesCost : 1) *
                        (on_one == 1 ? cost.alone : static_cast<double>(on_one) * cost.shared);
    if (best.lanes == 0 || time < least) {
      least = time;
      best = {cost.lanes, cost.lanes == 8 && on_one == 3, parts, length};
    }
  };
  for (const Cost& cost : kCosts) consider(cost, 1);
  if (!p.cu_seqlens)
    for (int64_t parts = 2; parts <= kMostParts; ++parts) consider(kCosts[0], parts);
  return best;
}

ScanPlan plan_of(const SelectiveScanFwdParams& p, const Context& context) {
  if (p.dstate > 16) return {};
  return choose_plan(p, context.cuda().num_sms(), context.batch_invariant());
}

}  // namespace

bool is_varying_scan(const SelectiveScanFwdParams& p) {
  constexpr int64_t kMostStates = 256;
  constexpr int64_t kLeastBlockD = 8;
  return !p.complex && p.B.data != nullptr && p.C.data != nullptr && p.dstate <= kMostStates &&
         p.rows * p.nheads * ceil_div(p.headdim, kLeastBlockD) <= INT32_MAX;
}

size_t selective_scan_varying_fwd_workspace_size(const SelectiveScanFwdParams& p,
                                                 const Context& context) {
  const ScanPlan plan = plan_of(p, context);
  if (plan.parts <= 1) return 0;
  const auto channels = static_cast<size_t>((plan.parts - 1) * p.rows * p.nheads * p.headdim);
  return channels * static_cast<size_t>(p.dstate) * sizeof(float2) +
         (p.delta_sum ? channels * sizeof(float) : 0);
}

void selective_scan_varying_fwd(const SelectiveScanFwdParams& p, const Exec& exec) {
  const ScanPlan plan = plan_of(p, exec.context);
  with_type(p.dtype, [&](auto* type) {
    launch_varying_scan<std::remove_pointer_t<decltype(type)>>(p, plan, exec);
  });
}

}  // namespace ssmcore::cuda
