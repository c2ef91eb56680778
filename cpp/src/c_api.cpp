// The C interface: versions and contexts. Operators are in c_api_ops.cpp, models in
// c_api_model.cpp.
#include "ssmcore/c_api.h"

#include "c_api_call.h"
#include "ssmcore/version.h"

namespace ssmcore::c_api {
namespace {

// Memory from the caller's functions.
class CallbackAllocator final : public Allocator {
 public:
  CallbackAllocator(Device device, const ssmcore_allocator& functions)
      : device_(device), functions_(functions) {}

  Device device() const override { return device_; }
  void* allocate(size_t bytes, void* stream) override {
    void* data = functions_.allocate(functions_.user_data, bytes, stream);
    if (reinterpret_cast<uintptr_t>(data) % 64 == 0) return data;
    deallocate(data, bytes, stream);
    throw Error(ErrorCode::invalid_argument,
                "allocator: allocate returned memory that is not aligned to 64 bytes");
  }
  void deallocate(void* data, size_t bytes, void* stream) noexcept override {
    functions_.deallocate(functions_.user_data, data, bytes, stream);
  }

 private:
  Device device_;
  ssmcore_allocator functions_;
};

std::unique_ptr<Allocator> make_allocator(Device device, const ssmcore_allocator* given) {
  if (!given) return nullptr;
  const ssmcore_allocator functions = read_struct("context_create", "allocator", given);
  if (!functions.allocate || !functions.deallocate)
    throw Error(ErrorCode::invalid_argument,
                "context_create: allocator lacks allocate or deallocate");
  return std::make_unique<CallbackAllocator>(device, functions);
}

std::shared_ptr<HeldContext> make_context(const ssmcore_context_options& options) {
  const bool given = options.device.type != 0;
  const Device device = given ? to_device("context_create: the context", options.device) : Device{};
  std::unique_ptr<Allocator> allocator = make_allocator(device, options.allocator);
  const ContextOptions context_options{options.num_threads, allocator.get(),
                                       options.batch_invariant != 0};
  return std::shared_ptr<HeldContext>(
      new HeldContext{std::move(allocator), Context(device, context_options)});
}

}  // namespace
}  // namespace ssmcore::c_api

using namespace ssmcore::c_api;

const char* ssmcore_version(void) {
  return SSMCORE_VERSION_STRING;
}

ssmcore_status ssmcore_context_create(const ssmcore_context_options* options,
                                      ssmcore_context** context) {
  constexpr const char* kOp = "context_create";
  return guarded([&] {
    required(kOp, "context", context) = nullptr;
    *context = new ssmcore_context{make_context(read_options(kOp, options))};
  });
}

void ssmcore_context_destroy(ssmcore_context* context) {
  delete context;
}

ssmcore_status ssmcore_context_num_threads(const ssmcore_context* context, int32_t* num_threads) {
  constexpr const char* kOp = "context_num_threads";
  return guarded([&] {
    required(kOp, "num_threads", num_threads) =
        required(kOp, "context", context).held->context.num_threads();
  });
}

ssmcore_status ssmcore_context_set_num_threads(ssmcore_context* context, int32_t num_threads) {
  return guarded([&] {
    required("context_set_num_threads", "context", context)
        .held->context.set_num_threads(num_threads);
  });
}

ssmcore_status ssmcore_context_synchronize(const ssmcore_context* context, void* stream) {
  return guarded([&] {
    required("context_synchronize", "context", context).held->context.synchronize(stream);
  });
}
