// One call of an operator from a program of XLA. Its attributes say where each array is among the
// program's operands or results, by name, and hold what is no array.
#pragma once

#include <algorithm>
#include <shared_mutex>
#include <string>

#include "../call.h"
#include "ssmcore/error.h"
#include "xla/ffi/api/ffi.h"

namespace ssmcore {

class XlaCall {
 public:
  XlaCall(Device device, void* stream, xla::ffi::RemainingArgs operands,
          xla::ffi::RemainingRets results, xla::ffi::Dictionary attributes)
      : device_(device),
        stream_(stream),
        operands_(operands),
        results_(results),
        attributes_(attributes) {}

  // As those of Call.
  TensorView input(const char* name) const {
    if (!attributes_.contains(name)) return {};
    return narrowed(name, view(name, operands_.get<xla::ffi::AnyBuffer>(place(name)).value()));
  }
  TensorView output(const char* name) const {
    if (!attributes_.contains(name)) return {};
    auto result = results_.get<xla::ffi::AnyBuffer>(place(name));
    return narrowed(name, view(name, **result));
  }
  Gradient gradient(const char* name) const { return {output(name), false}; }
  template <typename T>
  T value(const char* name) const {
    return attributes_.get<T>(name).value();
  }
  Activation activation() const {
    return attributes_.contains("activation") ? Activation::silu : Activation::none;
  }

  // Nobody here holds the GIL, and threads of the operator never wait for those of XLA.
  template <typename Args>
  void run(size_t (*workspace_size)(const Args&, const Context&),
           void (*op)(const Args&, const Exec&), const Args& args) const {
    const Context& context = context_of(device_);
    const std::shared_lock<std::shared_mutex> lock(calls());
    const Buffer workspace(context.allocator(), workspace_size(args, context),
                           "an operator's workspace", stream_);
    op(args, Exec{context, stream_, workspace.data(), workspace.bytes()});
  }

 private:
  size_t place(const char* name) const { return static_cast<size_t>(value<int64_t>(name)); }

  DType dtype(const char* name, xla::ffi::DataType type) const {
    switch (type) {
      case xla::ffi::F32:
        return DType::float32;
      case xla::ffi::F64:
        return DType::float64;
      case xla::ffi::BF16:
        return DType::bfloat16;
      case xla::ffi::F16:
        return DType::float16;
      case xla::ffi::C64:
        return DType::complex64;
      case xla::ffi::S32:
        return DType::int32;
      default:
        throw Error(ErrorCode::invalid_argument,
                    std::string(name) + " has a dtype that ssmcore does not know");
    }
  }

  TensorView view(const char* name, const xla::ffi::AnyBuffer& buffer) const {
    const auto shape = buffer.dimensions();
    if (shape.size() > static_cast<size_t>(kMaxRank))
      throw Error(ErrorCode::invalid_argument,
                  std::string(name) + " has " + std::to_string(shape.size()) + " dimensions");
    TensorView view;
    view.data = buffer.untyped_data();
    view.dtype = dtype(name, buffer.element_type());
    view.device = device_;
    view.rank = static_cast<int>(shape.size());
    int64_t stride = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      view.shape[i] = shape[static_cast<size_t>(i)];
      view.strides[i] = stride;
      stride *= view.shape[i];
    }
    return view;
  }

  // How many chunks packed sequences have only their boundaries say; XLA's shapes are fixed, and
  // have room for the most. On a GPU, where boundaries cannot be seen, the operators expect that.
  TensorView narrowed(const std::string& name, const TensorView& whole) const {
    if (name != "chunk_states" || !attributes_.contains("cu_seqlens") ||
        device_.type != DeviceType::cpu)
      return whole;
    const TensorView boundaries = input("cu_seqlens");
    const int32_t* steps = boundaries.as<const int32_t>();
    const int64_t chunk_size = value<int64_t>("chunk_size");
    int64_t chunks = 0;
    for (int64_t s = 0; s + 1 < boundaries.shape[0]; ++s)  // the operator checks that they ascend
      chunks +=
          std::max<int64_t>(0, int64_t{steps[s + 1]} - steps[s] + chunk_size - 1) / chunk_size;
    return whole.slice(1, 0, std::min(chunks, whole.shape[1]));
  }

  Device device_;
  void* stream_;
  xla::ffi::RemainingArgs operands_;
  xla::ffi::RemainingRets results_;
  xla::ffi::Dictionary attributes_;
};

}  // namespace ssmcore
