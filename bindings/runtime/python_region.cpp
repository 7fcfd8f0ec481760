// SPDX-License-Identifier: Apache-2.0
#include "python_region.h"

#include <torch/csrc/utils/pybind.h>

#include "base/error.h"
#include "values.h"

namespace deepcompile {

PythonRegion::PythonRegion(PyObject* callable) : callable_(callable) {
  if (!PyCallable_Check(callable)) {
    throw UserError(std::string("[runtime] a region's code is a ") + Py_TYPE(callable)->tp_name +
                    ", which cannot be called.");
  }
  Py_INCREF(callable_);
}

PythonRegion::~PythonRegion() {
  if (!Py_IsInitialized()) return;  // the interpreter is gone, and the object with it
  const py::gil_scoped_acquire gil;
  Py_DECREF(callable_);
}

std::vector<RuntimeValue> PythonRegion::run(std::vector<RuntimeValue> inputs) {
  const py::gil_scoped_acquire gil;
  const auto boxed = py::reinterpret_steal<py::object>(list_to_python(inputs));
  inputs.clear();  // the list holds them now, and the code may let go of each
  const auto result =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(callable_, boxed.ptr()));
  if (!result) throw py::error_already_set();
  return list_from_python(result.ptr(), "an output of a region");
}

}  // namespace deepcompile
