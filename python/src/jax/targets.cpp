// The operators as targets of XLA's custom calls, which ssmcore/jax registers.
#include <new>

#include "../operators.h"
#include "xla_call.h"

namespace py = pybind11;
namespace ffi = xla::ffi;

namespace ssmcore {
namespace {

ffi::ErrorCode code_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
      return ffi::ErrorCode::kInvalidArgument;
    case ErrorCode::out_of_memory:
      return ffi::ErrorCode::kResourceExhausted;
    case ErrorCode::unsupported:
      return ffi::ErrorCode::kUnimplemented;
    default:
      return ffi::ErrorCode::kInternal;
  }
}

template <typename Function>
ffi::Error guarded(const Function& function) {
  try {
    function();
    return ffi::Error::Success();
  } catch (const Error& error) {
    return ffi::Error(code_of(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "ssmcore: out of memory");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

template <void (*op)(XlaCall&)>
XLA_FFI_Error* on_cpu(XLA_FFI_CallFrame* frame) {
  static auto* const handler =
      ffi::Ffi::Bind()
          .RemainingArgs()
          .RemainingRets()
          .Attrs()
          .To([](ffi::RemainingArgs operands, ffi::RemainingRets results,
                 ffi::Dictionary attributes) {
            return guarded([&] {
              XlaCall call(Device{}, nullptr, operands, results, attributes);
              op(call);
            });
          })
          .release();
  return handler->Call(frame);
}

template <void (*op)(XlaCall&)>
XLA_FFI_Error* on_cuda(XLA_FFI_CallFrame* frame) {
  static auto* const handler =
      ffi::Ffi::Bind()
          .Ctx<ffi::PlatformStream<void*>>()
          .Ctx<ffi::DeviceOrdinal>()
          .RemainingArgs()
          .RemainingRets()
          .Attrs()
          .To([](void* stream, int32_t index, ffi::RemainingArgs operands,
                 ffi::RemainingRets results, ffi::Dictionary attributes) {
            return guarded([&] {
              XlaCall call(Device{DeviceType::cuda, index}, stream, operands, results, attributes);
              op(call);
            });
          })
          .release();
  return handler->Call(frame);
}

// The handlers of an operator by platform, as JAX names them.
template <void (*op)(XlaCall&)>
py::dict handlers() {
  py::dict of_platform;
  of_platform["cpu"] = py::capsule(reinterpret_cast<void*>(&on_cpu<op>));
  of_platform["CUDA"] = py::capsule(reinterpret_cast<void*>(&on_cuda<op>));
  return of_platform;
}

}  // namespace

void bind_xla(py::module_& module) {
  py::dict targets;
  targets["selective_scan"] = handlers<call_selective_scan<XlaCall>>();
  targets["selective_scan_bwd"] = handlers<call_selective_scan_bwd<XlaCall>>();
  targets["causal_conv1d"] = handlers<call_causal_conv1d<XlaCall>>();
  targets["causal_conv1d_bwd"] = handlers<call_causal_conv1d_bwd<XlaCall>>();
  targets["mamba_block_train_fwd"] = handlers<call_mamba_block_train_fwd<XlaCall>>();
  targets["mamba_block_bwd"] = handlers<call_mamba_block_bwd<XlaCall>>();
  module.attr("XLA_TARGETS") = targets;
  module.attr("XLA_FFI_VERSION") = py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}

}  // namespace ssmcore
