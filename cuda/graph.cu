// Graphs of captured work, and what goes with replaying them: events, and memory of the host that
// kernels write.
#include "launch.h"

namespace ssmcore::cuda {
namespace {

template <typename Handle, typename Destroy>
std::shared_ptr<void> owned(DeviceState& device, Handle handle, const Destroy& destroy) {
  const int index = device.index();
  return std::shared_ptr<void>(handle, [index, destroy](void* object) {
    const DeviceGuard guard(index);
    destroy(static_cast<Handle>(object));
  });
}

}  // namespace

std::shared_ptr<void> make_host_memory(DeviceState& device, size_t bytes) {
  const DeviceGuard guard(device.index());
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable), "decoder");
  return owned(device, memory, [](void* object) { cudaFreeHost(object); });
}

std::shared_ptr<void> make_event(DeviceState& device) {
  const DeviceGuard guard(device.index());
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
  return owned(device, event, [](cudaEvent_t object) { cudaEventDestroy(object); });
}

void record_event(DeviceState& device, void* event, void* stream) {
  const DeviceGuard guard(device.index());
  check(cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)),
        "event");
}

void wait_for_event(DeviceState& device, void* event) {
  const DeviceGuard guard(device.index());
  check(cudaEventSynchronize(static_cast<cudaEvent_t>(event)), "event");
  device.raise_faults();
}

std::shared_ptr<void> capture(DeviceState& device, const char* op,
                              const std::function<void(void* stream)>& work) {
  const DeviceGuard guard(device.index());
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), op);
  const auto stream_owner =
      owned(device, stream, [](cudaStream_t object) { cudaStreamDestroy(object); });
  cudaGraph_t graph = nullptr;
  // Relaxed: what runs for the first time may load its code, and others may do as they please.
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), op);
  try {
    work(stream);
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), op);
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(status, op);
  return owned(device, executable, [](cudaGraphExec_t object) { cudaGraphExecDestroy(object); });
}

void launch_graph(DeviceState& device, void* graph, void* stream) {
  const DeviceGuard guard(device.index());
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), static_cast<cudaStream_t>(stream)),
        "graph");
}

}  // namespace ssmcore::cuda
