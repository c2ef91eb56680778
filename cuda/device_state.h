// What a context of a GPU holds, and what every launcher needs of it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <mutex>

#include "../cpp/src/cuda_backend.h"
#include "device/fault.cuh"

namespace ssmcore::cuda {

class LinearPlans;

class DeviceState {
 public:
  explicit DeviceState(int index);
  ~DeviceState();
  DeviceState(const DeviceState&) = delete;
  DeviceState& operator=(const DeviceState&) = delete;

  int index() const { return index_; }
  int num_sms() const { return num_sms_; }
  // Whether a launch can begin before the one before it has ended: since compute capability 9.0.
  bool can_begin_early() const { return can_begin_early_; }
  // Dynamic shared memory that a block may be given.
  size_t shared_memory_per_block() const { return shared_memory_per_block_; }

  // For kernels: where report() leaves what they find wrong.
  uint32_t* faults() const { return device_faults_; }
  // Throws Error(invalid_argument) for what kernels have reported since the last time.
  void raise_faults();

  // Made on first use. Throws Error(unsupported) where there is no cuBLASLt.
  LinearPlans& linear_plans();

 private:
  int index_, num_sms_ = 0;
  bool can_begin_early_ = false;
  size_t shared_memory_per_block_ = 0;
  uint32_t* host_faults_ = nullptr;  // pinned memory that the device writes
  uint32_t* device_faults_ = nullptr;
  std::once_flag linear_plans_once_;
  std::unique_ptr<LinearPlans> linear_plans_;
};

// Throws Error(unsupported) unless a machine of `count` devices has this one.
void require_device(int index, int count);

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1, index_;
};

}  // namespace ssmcore::cuda
