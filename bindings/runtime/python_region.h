// SPDX-License-Identifier: Apache-2.0
// Region code hosted by Python: a boxed callable, f(list) -> sequence, which
// empties the list when it has taken its inputs (Inductor's convention).
#pragma once

#include <Python.h>

#include "runtime/exec/region.h"
#include "shared_object.h"

namespace deepcompile {

// Throws the Python error that is set: torch's error of a device without memory as
// C++'s own, so that the runtime can make room.
[[noreturn]] void throw_python_error();

class PythonRegion final : public RegionCode {
 public:
  explicit PythonRegion(PyObject* callable);  // the GIL must be held

  // Takes the GIL for the call. A Python exception passes through as it is.
  std::vector<RuntimeValue> run(std::vector<RuntimeValue> inputs) override;

 private:
  SharedObject callable_;
};

}  // namespace deepcompile
