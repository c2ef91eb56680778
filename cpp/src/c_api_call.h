// One call through the C interface: its arguments as C++ has them, its workspace, its errors.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "ssmcore/c_api.h"
#include "ssmcore/context.h"
#include "ssmcore/error.h"
#include "ssmcore/gradient.h"
#include "ssmcore/tensor.h"

namespace ssmcore::c_api {

// A context and the caller's allocator that it uses, if any.
struct HeldContext {
  std::unique_ptr<Allocator> allocator;
  Context context;
};

// The exception being handled as a status, its message as this thread's last error.
ssmcore_status record_exception() noexcept;

// Runs the body of one function of the interface.
template <typename Body>
ssmcore_status guarded(const Body& body) noexcept {
  try {
    body();
    return SSMCORE_OK;
  } catch (...) {
    return record_exception();
  }
}

// What the caller's pointer points to; throws Error(invalid_argument) for NULL.
template <typename T>
T& required(const char* op, const char* name, T* pointer) {
  if (!pointer)
    throw Error(ErrorCode::invalid_argument, std::string(op) + ": " + name + " is NULL");
  return *pointer;
}

// Throws unless a struct_size is that of some version of a struct that has `known_size` here.
void check_struct_size(const char* op, const char* name, size_t size, size_t known_size);

// Copies a struct that may be of another version of the header: fields it has not are left alone,
// and what it has beyond the known ones must be 0.
void read_struct(const char* op, const char* name, const void* given, size_t given_size,
                 void* known, size_t known_size);

template <typename Struct>
Struct read_struct(const char* op, const char* name, const Struct* given) {
  Struct known{};
  read_struct(op, name, given, required(op, name, given).struct_size, &known, sizeof(Struct));
  return known;
}

// The same, defaults for NULL.
template <typename Struct>
Struct read_options(const char* op, const Struct* given) {
  return given ? read_struct(op, "options", given) : Struct{};
}

// The dtype a code, a width and lanes stand for. `what` begins the message of the error.
DType to_dtype(const std::string& what, ssmcore_dtype dtype);
ssmcore_dtype from_dtype(DType dtype);

Device to_device(const std::string& what, ssmcore_device device);

// The tensors of one call, by the names of their arguments.
class TensorReader {
 public:
  explicit TensorReader(const char* op) : op_(op) {}

  const char* op() const { return op_; }
  // NULL is absent. Throws Error(invalid_argument) for what is not a tensor that ssmcore knows;
  // whether it suits the call is for the operator to say.
  TensorView operator()(const ssmcore_tensor* tensor, const char* name) const;
  Gradient operator()(const ssmcore_gradient& gradient, const char* name) const {
    return {(*this)(gradient.tensor, name), gradient.accumulate != 0};
  }

 private:
  const char* op_;
};

// Where a call runs and what it was given to run with.
struct Resources {
  const Context& context;
  void* workspace;
  size_t workspace_bytes;
  void* stream;
};

// Calls run(exec) with the caller's workspace or, where that is NULL, with one of needed() bytes.
template <typename Needed, typename Run>
void with_workspace(const char* op, const Resources& given, const Needed& needed, const Run& run) {
  constexpr size_t kAlignment = 64;
  if (reinterpret_cast<uintptr_t>(given.workspace) % kAlignment != 0)
    throw Error(ErrorCode::invalid_argument,
                std::string(op) + ": workspace is not aligned to 64 bytes");
  if (given.workspace || given.workspace_bytes > 0)
    return run(Exec{given.context, given.stream, given.workspace, given.workspace_bytes});
  const Buffer workspace(given.context.allocator(), needed(), op, given.stream);
  run(Exec{given.context, given.stream, workspace.data(), workspace.bytes()});
}

}  // namespace ssmcore::c_api

struct ssmcore_context {
  std::shared_ptr<ssmcore::c_api::HeldContext> held;
};
