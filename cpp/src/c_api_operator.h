// An operator through the C interface: where `lower(const ssmcore_<name>_args&, const
// TensorReader&)` gives its arguments as C++ has them, a line defines its two functions.
#pragma once

#include "c_api_call.h"

namespace ssmcore::c_api {

template <typename Args>
using WorkspaceSize = size_t (*)(const Args&, const Context&);

template <typename CArgs, typename Lower, typename Args>
ssmcore_status query(const char* op, const Lower& lower, WorkspaceSize<Args> workspace_size,
                     const ssmcore_context* context, const CArgs* c_args, size_t* bytes) {
  return guarded([&] {
    const Context& device_context = required(op, "context", context).held->context;
    const auto args = lower(read_struct(op, "args", c_args), TensorReader(op));
    required(op, "bytes", bytes) = workspace_size(args, device_context);
  });
}

template <typename CArgs, typename Lower, typename Args>
ssmcore_status run(const char* op, const Lower& lower, WorkspaceSize<Args> workspace_size,
                   void (*function)(const Args&, const Exec&), const ssmcore_context* context,
                   const CArgs* c_args, void* workspace, size_t workspace_bytes, void* stream) {
  return guarded([&] {
    const Context& device_context = required(op, "context", context).held->context;
    const auto args = lower(read_struct(op, "args", c_args), TensorReader(op));
    with_workspace(
        op, {device_context, workspace, workspace_bytes, stream},
        [&] { return workspace_size(args, device_context); },
        [&](const Exec& exec) { function(args, exec); });
  });
}

}  // namespace ssmcore::c_api

// The file's own `lower`, which a template could not find.
#define SSMCORE_LOWER(name) \
  [](const ssmcore_##name##_args& c, const TensorReader& tensor) { return lower(c, tensor); }

// Defines ssmcore_<name> and ssmcore_<name>_workspace_size; errors begin with `op`.
#define SSMCORE_DEFINE_OPERATOR(name, op)                                                          \
  ssmcore_status ssmcore_##name##_workspace_size(                                                  \
      const ssmcore_context* context, const ssmcore_##name##_args* args, size_t* bytes) {          \
    return query(op, SSMCORE_LOWER(name), name##_workspace_size, context, args, bytes);            \
  }                                                                                                \
  ssmcore_status ssmcore_##name(const ssmcore_context* context, const ssmcore_##name##_args* args, \
                                void* workspace, size_t workspace_bytes, void* stream) {           \
    return run(op, SSMCORE_LOWER(name), name##_workspace_size, name, context, args, workspace,     \
               workspace_bytes, stream);                                                           \
  }
