// Context: what is made once per device. Exec: where and with what one call runs.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "ssmcore/buffer.h"
#include "ssmcore/tensor.h"

namespace ssmcore {

class ThreadPool;
namespace cuda {
class DeviceState;
}

// CPU instruction sets for which the kernels are compiled, in ascending order.
enum class Isa { baseline, avx2, avx512, avx512_bf16 };

const char* isa_name(Isa isa);
// The best instruction set that this build has kernels for and this machine runs.
Isa detect_isa();

struct ContextOptions {
  // CPU threads that one call uses, the caller's included. 0: SSMCORE_NUM_THREADS if set, else
  // every core this process may run on.
  int num_threads = 0;
  // Memory for buffers that ssmcore makes for the caller. Null: the device's default.
  Allocator* allocator = nullptr;
  // Results of a row whose bits do not depend on the batch it is in, for some speed on a GPU. On
  // the CPU they never do.
  bool batch_invariant = false;
};

// Device properties, thread pool and allocator for one device. Made once and held by the caller;
// usable from several threads at a time (calls on one CPU context share its threads in turn).
// The CPU instruction set is detect_isa(), or a lower one named by SSMCORE_ISA.
class Context {
 public:
  // Throws Error(unsupported) for a device this build or machine does not have.
  explicit Context(Device device = {}, const ContextOptions& options = {});
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  Device device() const { return device_; }
  Isa isa() const { return isa_; }
  Allocator& allocator() const { return *allocator_; }
  ThreadPool& thread_pool() const { return *thread_pool_; }
  bool batch_invariant() const { return batch_invariant_; }
  // What the CUDA kernels need to know of their device; not there on the CPU.
  cuda::DeviceState& cuda() const { return *cuda_; }

  // Waits for what was launched on `stream`, a device stream. Throws Error(device_error) where the
  // device failed, and Error(invalid_argument) where a kernel met an index that is out of range
  // or a slot that two rows name: on a GPU nobody can look at indices before. (The next call on the
  // context throws that too.)
  void synchronize(void* stream = nullptr) const;

  int num_threads() const;
  // Not between asking for the size of a workspace and the call that uses it. Throws
  // Error(invalid_argument) for n < 1.
  void set_num_threads(int n);

 private:
  Device device_;
  Isa isa_;
  Allocator* allocator_;
  bool batch_invariant_;
  std::unique_ptr<ThreadPool> thread_pool_;
  std::shared_ptr<cuda::DeviceState> cuda_;
};

// CUDA devices that this build and machine can use; 0 where there is no driver.
int cuda_device_count();

struct DeviceMemory {
  size_t free = 0, total = 0;  // bytes
};

// Of a context's GPU, whoever uses it. Throws Error(unsupported) on the CPU.
DeviceMemory device_memory(const Context& context);

// Where to load cuBLASLt from, which large products on a GPU run on, if this process has not loaded
// a copy of it and the environment variable SSMCORE_CUBLASLT names none. By default the loader
// looks for it by name. Heeded until the first such product.
void set_cublaslt_path(const std::string& path);

// Everything a call needs besides its tensors. Operators allocate nothing: the caller provides
// `workspace`, at least as large as the operator's *_workspace_size says, aligned to 64 bytes.
struct Exec {
  const Context& context;
  void* stream = nullptr;  // device stream; the CPU ignores it
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

}  // namespace ssmcore
