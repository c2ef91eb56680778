// What kernels find wrong in values that the host cannot see: reported, and never acted upon.
#pragma once

#include <cstdint>

namespace ssmcore::cuda {

// Each has its message in device_state.cu.
enum class Fault {
  selective_scan_cu_seqlens,
  selective_scan_state_indices,
  causal_conv1d_cu_seqlens,
  causal_conv1d_state_indices,
  causal_conv1d_cache_seqlens,
  embedding_token_ids,
  sample_history,
  sample_setting,
  sample_logits,
  count
};

// `faults` is DeviceState::faults(). All who report write the same.
__device__ inline void report(uint32_t* faults, Fault fault) {
  *static_cast<volatile uint32_t*>(faults + static_cast<int>(fault)) = 1;
}

}  // namespace ssmcore::cuda
