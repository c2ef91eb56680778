// One call of an operator from Python: its keyword arguments, its workspace, the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <shared_mutex>
#include <string>
#include <vector>

#include "borrow.h"
#include "ssmcore/context.h"
#include "ssmcore/error.h"

namespace ssmcore {

// The context that all Python calls share.
Context& cpu_context();

// Held shared by every call, from the size of its workspace to its end, and exclusively by whoever
// changes the number of threads, on which that size depends.
std::shared_mutex& calls();

class Call {
 public:
  Call(const char* op, const pybind11::kwargs& arguments) : op_(op), arguments_(arguments) {}

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

  template <typename T>
  T value(const char* name) const {
    return arguments_[name].template cast<T>();
  }

  // Runs an operator and its workspace_size function, without the GIL.
  template <typename Args>
  void run(size_t (*workspace_size)(const Args&, const Context&),
           void (*op)(const Args&, const Exec&), const Args& args) const {
    const Context& context = cpu_context();
    const pybind11::gil_scoped_release release;
    const std::shared_lock<std::shared_mutex> lock(calls());
    const Buffer workspace(context.allocator(), workspace_size ? workspace_size(args, context) : 0,
                           op_);
    op(args, Exec{context, nullptr, workspace.data(), workspace.bytes()});
  }

 private:
  Borrowed array(const char* name) {
    if (!arguments_.contains(name) || arguments_[name].is_none()) return {};
    borrowed_.push_back(borrow(arguments_[name], std::string(op_) + ": " + name));
    return borrowed_.back();
  }

  const char* op_;
  const pybind11::kwargs& arguments_;
  std::vector<Borrowed> borrowed_;
};

void bind_ops(pybind11::module_& module);
void bind_model(pybind11::module_& module);

}  // namespace ssmcore
