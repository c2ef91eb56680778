// Python arrays as TensorViews, without copying.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "ssmcore/tensor.h"

namespace ssmcore {

// A view of a Python array, and what keeps its memory alive.
struct Borrowed {
  TensorView view;
  bool read_only = false;
  pybind11::object owner;
};

// NumPy arrays are read through NumPy (which has bfloat16 from ml_dtypes), anything else through
// DLPack; memory of a GPU is then ready on `stream`. `what`, as in "selective_scan: u", begins the
// message of the Error(invalid_argument) for what is not an array or has a dtype or a device that
// ssmcore does not know.
Borrowed borrow(pybind11::handle array, const std::string& what, void* stream = nullptr);

// The shape and dtype of an array as a view that nobody may look into; a NumPy array is borrowed.
TensorView without_memory(pybind11::handle array, const std::string& what);

}  // namespace ssmcore
