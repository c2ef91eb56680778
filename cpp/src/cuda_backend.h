// The CUDA backend as the rest of the library sees it: cuda/, or no_cuda.cpp in a build without it.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "ssmcore/buffer.h"

namespace ssmcore::cuda {

// What a context of a GPU holds: properties, kernels' reports, plans of matrix products.
class DeviceState;

// Throws Error(unsupported) for a device that is not there or that this build has no kernels for.
std::shared_ptr<DeviceState> make_device_state(int index);

int device_count();

void device_memory(DeviceState& device, size_t* free, size_t* total);

Allocator& default_allocator(int index);

// Where cuBLASLt is, if the process has not loaded it already and SSMCORE_CUBLASLT does not say.
// Heeded until the first product that needs it.
void set_cublaslt_path(const char* path);

// Waits for `stream` and throws what the device or a kernel had to report.
void synchronize(DeviceState& device, void* stream);

// Waits for everything on the device, and throws likewise.
void synchronize_device(DeviceState& device);

// A stream that does not wait for the default one.
void* make_stream(DeviceState& device);
void destroy_stream(DeviceState& device, void* stream) noexcept;

// `stream` goes on once `earlier` has come to here.
void wait_for(DeviceState& device, void* stream, void* earlier);

// Between any two of host and device, in the order of `stream`. From and to pageable host memory
// it returns when the copy is done.
void copy_bytes(DeviceState& device, void* to, const void* from, size_t bytes, void* stream);

// Memory of the device, in the order of `stream`.
void zero_bytes(DeviceState& device, void* to, size_t bytes, void* stream);

// Memory of the host that kernels can write.
std::shared_ptr<void> make_host_memory(DeviceState& device, size_t bytes);

// A point in the order of a stream, for the host to wait for; it then throws what a kernel had to
// report.
std::shared_ptr<void> make_event(DeviceState& device);
void record_event(DeviceState& device, void* event, void* stream);
void wait_for_event(DeviceState& device, void* event);

// What `work` launches on the stream that it is given, as one graph, to be launched any number of
// times. `op` begins messages of errors.
std::shared_ptr<void> capture(DeviceState& device, const char* op,
                              const std::function<void(void* stream)>& work);
void launch_graph(DeviceState& device, void* graph, void* stream);

}  // namespace ssmcore::cuda
