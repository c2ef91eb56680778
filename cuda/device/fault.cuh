// What kernels find wrong in values that the host cannot see: reported, and never acted upon.
#pragma once

#include <cstdint>

namespace ssmcore::cuda {

// Each has its message in device_state.cu.
enum class Fault {
  selective_scan_cu_seqlens,
  selective_scan_state_indices,
  selective_scan_shared_slot,
  causal_conv1d_cu_seqlens,
  causal_conv1d_state_indices,
  causal_conv1d_shared_slot,
  causal_conv1d_cache_seqlens,
  embedding_token_ids,
  cross_entropy_targets,
  sample_history,
  sample_setting,
  sample_logits,
  count
};

// `faults` is DeviceState::faults(). All who report write the same.
__device__ inline void report(uint32_t* faults, Fault fault) {
  *static_cast<volatile uint32_t*>(faults + static_cast<int>(fault)) = 1;
}

// Reports a row whose slot is that of a row before it. Each of `lanes` threads compares its share
// of those rows: a handful of loads, none of which anything waits for.
__device__ __forceinline__ void report_shared_slot(const int32_t* slots, int64_t stride,
                                                   int64_t row, int64_t lane, int64_t lanes,
                                                   uint32_t* faults, Fault fault) {
  const int32_t slot = slots[row * stride];
  if (slot < 0) return;  // none
  for (int64_t before = lane; before < row; before += lanes)
    if (slots[before * stride] == slot) report(faults, fault);
}

}  // namespace ssmcore::cuda
