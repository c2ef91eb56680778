#include <string>

#include "device_state.h"
#include "launch.h"
#include "linear_plans.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {
namespace {

constexpr int kFaults = static_cast<int>(Fault::count);

const char* message(Fault fault) {
  switch (fault) {
    case Fault::selective_scan_cu_seqlens:
      return "selective_scan: cu_seqlens does not ascend from 0 to the sequence length";
    case Fault::selective_scan_state_indices:
      return "selective_scan or selective_state_update: state_indices holds an index beyond the "
             "slots";
    case Fault::selective_scan_shared_slot:
      return "selective_scan or selective_state_update: state_indices holds a slot twice; slots "
             "must differ";
    case Fault::causal_conv1d_cu_seqlens:
      return "causal_conv1d or causal_conv1d_bwd: cu_seqlens does not ascend from 0 to the "
             "sequence length";
    case Fault::causal_conv1d_state_indices:
      return "causal_conv1d, causal_conv1d_bwd or causal_conv1d_update: state_indices holds an "
             "index beyond the slots";
    case Fault::causal_conv1d_shared_slot:
      return "causal_conv1d, causal_conv1d_bwd or causal_conv1d_update: state_indices holds a slot "
             "twice; slots must differ";
    case Fault::causal_conv1d_cache_seqlens:
      return "causal_conv1d_update: cache_seqlens holds a negative entry";
    case Fault::embedding_token_ids:
      return "embedding or embedding_bwd: token_ids holds an id outside the vocabulary";
    case Fault::cross_entropy_targets:
      return "cross_entropy or cross_entropy_bwd: targets holds a value that is neither in the "
             "vocabulary nor ignore_index";
    case Fault::sample_history:
      return "sample: history holds an id outside the vocabulary";
    case Fault::sample_setting:
      return "sample: repetition_penalty, temperature, top_k, top_p or min_p is out of its range";
    case Fault::sample_logits:
      return "sample: the logits of a row hold a NaN or no finite largest value";
    case Fault::count:
      break;
  }
  return "";
}

// Any kernel will do to ask whether this build has code for a device.
__global__ void probe_kernel() {}

[[noreturn]] void unsupported(int index, const std::string& problem) {
  throw Error(ErrorCode::unsupported, "device cuda:" + std::to_string(index) + ": " + problem);
}

}  // namespace

void require_device(int index, int count) {
  if (index < 0 || index >= count)
    unsupported(index, "this machine has " + std::to_string(count) + " usable CUDA devices");
}

DeviceGuard::DeviceGuard(int index) : index_(index) {
  check(cudaGetDevice(&before_), "device");
  if (before_ != index_) check(cudaSetDevice(index_), "device");
}

DeviceGuard::~DeviceGuard() {
  if (before_ != index_) cudaSetDevice(before_);
}

DeviceState::DeviceState(int index) : index_(index) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice ||
      status == cudaErrorInitializationError)
    unsupported(index, std::string("no usable GPU or driver (") + cudaGetErrorString(status) + ")");
  check(status, "device");
  require_device(index, count);
  const DeviceGuard guard(index);
  int major = 0, minor = 0, shared = 0;
  check(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, index), "device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "device");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "device");
  shared_memory_per_block_ = static_cast<size_t>(shared);
  can_begin_early_ = major >= 9;
  cudaFuncAttributes attributes;
  const cudaError_t image = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (image == cudaErrorNoKernelImageForDevice || image == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();  // it is not the next call's
    unsupported(index, "ssmcore was built for " SSMCORE_CUDA_ARCHITECTURES
                       ", this device has compute capability " +
                           std::to_string(major) + "." + std::to_string(minor));
  }
  check(image, "device");
  check(cudaHostAlloc(reinterpret_cast<void**>(&host_faults_), kFaults * sizeof(uint32_t),
                      cudaHostAllocMapped),
        "device");
  for (int i = 0; i < kFaults; ++i) host_faults_[i] = 0;
  check(cudaHostGetDevicePointer(reinterpret_cast<void**>(&device_faults_), host_faults_, 0),
        "device");
}

DeviceState::~DeviceState() {
  cudaFreeHost(host_faults_);
}

void DeviceState::raise_faults() {
  std::string found;
  for (int i = 0; i < kFaults; ++i) {
    volatile uint32_t& fault = host_faults_[i];
    if (fault == 0) continue;
    fault = 0;
    found += (found.empty() ? "" : "; ") + std::string(message(static_cast<Fault>(i)));
  }
  if (!found.empty())
    throw Error(ErrorCode::invalid_argument,
                found + " (found on cuda:" + std::to_string(index_) + " while it ran)");
}

LinearPlans& DeviceState::linear_plans() {
  std::call_once(linear_plans_once_, [&] { linear_plans_ = std::make_unique<LinearPlans>(); });
  return *linear_plans_;
}

std::shared_ptr<DeviceState> make_device_state(int index) {
  return std::make_shared<DeviceState>(index);
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // no device is no error
  return 0;
}

void device_memory(DeviceState& device, size_t* free, size_t* total) {
  const DeviceGuard guard(device.index());
  check(cudaMemGetInfo(free, total), "device_memory");
}

void synchronize(DeviceState& device, void* stream) {
  const DeviceGuard guard(device.index());
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "synchronize");
  device.raise_faults();
}

void* make_stream(DeviceState& device) {
  const DeviceGuard guard(device.index());
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  return stream;
}

void destroy_stream(DeviceState& device, void* stream) noexcept {
  const DeviceGuard guard(device.index());
  cudaStreamDestroy(static_cast<cudaStream_t>(stream));
}

void wait_for(DeviceState& device, void* stream, void* earlier) {
  const DeviceGuard guard(device.index());
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "stream");
  cudaError_t status = cudaEventRecord(event, static_cast<cudaStream_t>(earlier));
  if (status == cudaSuccess) status = cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), event);
  cudaEventDestroy(event);  // once it has come to pass
  check(status, "stream");
}

void copy_bytes(DeviceState& device, void* to, const void* from, size_t bytes, void* stream) {
  const DeviceGuard guard(device.index());
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
        "copy");
}

void zero_bytes(DeviceState& device, void* to, size_t bytes, void* stream) {
  const DeviceGuard guard(device.index());
  check(cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream)), "copy");
}

}  // namespace ssmcore::cuda
