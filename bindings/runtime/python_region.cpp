// SPDX-License-Identifier: Apache-2.0
#include "python_region.h"

#include <c10/util/Exception.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "base/error.h"
#include "values.h"

namespace deepcompile {

namespace {

PyObject* out_of_memory_type() {
  static PyObject* const type =
      py::module_::import("torch").attr("OutOfMemoryError").cast<py::object>().release().ptr();
  return type;
}

}  // namespace

// Clearing the error lets go of the tensors in its traceback.
void throw_python_error() {
  if (!PyErr_ExceptionMatches(out_of_memory_type())) throw py::error_already_set();
  std::string message;
  {
    const py::error_already_set error;
    message = py::str(error.value()).cast<std::string>();
  }
  throw c10::OutOfMemoryError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, message);
}

PythonRegion::PythonRegion(PyObject* callable) : callable_(share(callable)) {
  if (!PyCallable_Check(callable)) {
    throw UserError(std::string("[runtime] a region's code is a ") + Py_TYPE(callable)->tp_name +
                    ", which cannot be called.");
  }
  out_of_memory_type();  // imported now: not while an error is set
}

std::vector<RuntimeValue> PythonRegion::run(std::vector<RuntimeValue> inputs) {
  const py::gil_scoped_acquire gil;
  const auto boxed = py::reinterpret_steal<py::object>(list_to_python(inputs));
  inputs.clear();  // the list holds them now, and the code may let go of each
  const auto result =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(callable_.get(), boxed.ptr()));
  if (!result) throw_python_error();
  return list_from_python(result.ptr(), "an output of a region");
}

}  // namespace deepcompile
