// Bytes of either device, in the order of a stream on a GPU.
#pragma once

#include <cstddef>

#include "ssmcore/context.h"

namespace ssmcore {

// Between the host and the context's device, or within either. From and to pageable memory of the
// host, `from` may change, and `to` is written, once this returns.
void copy_bytes(const Context& context, void* to, const void* from, size_t bytes, void* stream);

// Of the host, as far as the system says: what can be had without swapping, within the limit of the
// container. SIZE_MAX where it says nothing.
size_t available_host_memory();

// Of the context's device.
void zero_bytes(const Context& context, void* to, size_t bytes, void* stream);

}  // namespace ssmcore
