// Without the headers of jaxlib: no operator for XLA.
#include "call.h"

void ssmcore::bind_xla(pybind11::module_& module) {
  module.attr("XLA_TARGETS") = pybind11::dict();
}
