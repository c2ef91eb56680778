// One call of an operator from Python: its keyword arguments, where it runs, its workspace, the
// GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <shared_mutex>
#include <string>
#include <vector>

#include "borrow.h"
#include "device.h"
#include "ssmcore/causal_conv1d.h"
#include "ssmcore/context.h"
#include "ssmcore/error.h"
#include "ssmcore/gradient.h"

namespace ssmcore {

// Held shared by every call, from the size of its workspace to its end, and exclusively by whoever
// changes the number of threads, on which that size depends.
std::shared_mutex& calls();

class Call {
 public:
  // The keyword `on` says where, as ssmcore/_arrays.py makes it: None for the CPU, or the tuple
  // (index of the GPU, stream, type of arrays, check, batch_invariant).
  // With `only_check`, arrays need no more than a shape and a dtype, and nothing runs.
  Call(const char* op, const pybind11::kwargs& arguments) : op_(op), arguments_(arguments) {
    only_check_ = arguments.contains("only_check") && arguments["only_check"].cast<bool>();
    if (!arguments.contains("on") || arguments["on"].is_none()) return;
    const pybind11::tuple on = arguments["on"];
    device_ = {DeviceType::cuda, on[0].cast<int>()};
    stream_ = reinterpret_cast<void*>(on[1].cast<uintptr_t>());
    ordered_type_ = on[2];
    check_ = on[3].cast<bool>();
    batch_invariant_ = on[4].cast<bool>();
  }

  // An array that is read; absent where it is None or not given.
  TensorView input(const char* name) { return array(name).view; }

  // An array that is written.
  TensorView output(const char* name) {
    const Borrowed borrowed = array(name);
    if (borrowed.read_only)
      throw Error(ErrorCode::invalid_argument,
                  std::string(op_) + ": " + name + " is read-only, but would be written");
    return borrowed.view;
  }

  // A gradient that is written, or added to where the keyword `accumulate` holds its name.
  Gradient gradient(const char* name) {
    const bool accumulate =
        arguments_.contains("accumulate") && arguments_["accumulate"].contains(name);
    return {output(name), accumulate};
  }

  template <typename T>
  T value(const char* name) const {
    return arguments_[name].template cast<T>();
  }

  Activation activation() const {
    const pybind11::handle name = arguments_["activation"];
    if (name.is_none()) return Activation::none;
    if (pybind11::isinstance<pybind11::str>(name)) {
      const std::string text = name.cast<std::string>();
      if (text == "silu" || text == "swish") return Activation::silu;
    }
    throw Error(ErrorCode::invalid_argument, std::string(op_) + ": activation is " +
                                                 std::string(pybind11::repr(name)) +
                                                 ", expected None, 'silu' or 'swish'");
  }

  // Runs an operator and its workspace_size function, without the GIL.
  template <typename Args>
  void run(size_t (*workspace_size)(const Args&, const Context&),
           void (*op)(const Args&, const Exec&), const Args& args) const {
    const pybind11::gil_scoped_release release;
    const Context& context = context_of(device_, batch_invariant_);
    if (only_check_) {
      workspace_size(args, context);
      return;
    }
    const std::shared_lock<std::shared_mutex> lock(calls());
    const Buffer workspace(context.allocator(), workspace_size ? workspace_size(args, context) : 0,
                           op_, stream_);
    op(args, Exec{context, stream_, workspace.data(), workspace.bytes()});
    if (check_ || !released_in_order_) context.synchronize(stream_);
  }

 private:
  Borrowed array(const char* name) {
    if (!arguments_.contains(name) || arguments_[name].is_none()) return {};
    const pybind11::handle given = arguments_[name];
    if (only_check_) return {without_memory(given, std::string(op_) + ": " + name), false, {}};
    borrowed_.push_back(borrow(given, std::string(op_) + ": " + name, stream_));
    // Another library may use the memory again as soon as this returns.
    if (device_.type == DeviceType::cuda &&
        (ordered_type_.is_none() || !pybind11::isinstance(given, ordered_type_)))
      released_in_order_ = false;
    return borrowed_.back();
  }

  const char* op_;
  const pybind11::kwargs& arguments_;
  Device device_;
  void* stream_ = nullptr;
  pybind11::object ordered_type_;  // of arrays whose memory is only used again after the stream
  bool only_check_ = false, check_ = false, batch_invariant_ = false, released_in_order_ = true;
  std::vector<Borrowed> borrowed_;
};

// A contiguous view as an ssmcore.Array, whose memory `owner` keeps.
pybind11::object array_of(const TensorView& view, std::shared_ptr<const void> owner);

void bind_arrays(pybind11::module_& module);
void bind_ops(pybind11::module_& module);
void bind_model(pybind11::module_& module);
void bind_trainer(pybind11::module_& module);
void bind_xla(pybind11::module_& module);

}  // namespace ssmcore
