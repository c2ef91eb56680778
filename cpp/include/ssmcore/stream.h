// Streams of a GPU, for those who have no CUDA runtime of their own at hand.
#pragma once

#include "ssmcore/context.h"

namespace ssmcore {

// A stream of the context's device, to put in Exec::stream, that does not wait for the default one.
// On the CPU there is none, and its handle is null. The context must outlive it.
class Stream {
 public:
  explicit Stream(const Context& context);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void* handle() const { return handle_; }

 private:
  const Context& context_;
  void* handle_ = nullptr;
};

// What is launched on `stream` from here on begins after all that was launched on `earlier`. Both
// are streams of the context's device (null is the default one); on the CPU nothing is to be done.
void wait_for(const Context& context, void* stream, void* earlier);

// Copies between host and device, or within one of them: contiguous views of one shape and dtype,
// each on the CPU or on the device of `exec`. A copy that involves a GPU is in the order of the
// stream; one from or to memory of the host is done when this returns. Throws
// Error(invalid_argument) for views that differ.
void copy(const TensorView& source, const TensorView& target, const Exec& exec);

}  // namespace ssmcore
