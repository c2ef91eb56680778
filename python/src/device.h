// The contexts and streams that calls from Python use.
#pragma once

#include "ssmcore/context.h"

namespace ssmcore {

// The context that all calls on a device share; made at the first one. Throws Error(unsupported)
// where there is no such device.
Context& context_of(Device device, bool batch_invariant = false);

inline Context& cpu_context() {
  return context_of({});
}

// The stream of a GPU for arrays of no library with streams of its own; null for the CPU.
void* own_stream(Device device);

// "cpu", "cuda" or "cuda:1". Throws Error(invalid_argument).
Device parse_device(const std::string& name);

}  // namespace ssmcore
