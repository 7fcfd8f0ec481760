// SPDX-License-Identifier: Apache-2.0
#include "shared_object.h"

#include <torch/csrc/utils/pybind.h>

namespace deepcompile {

SharedObject share(PyObject* object) {
  Py_INCREF(object);
  return {object, [](PyObject* held) {
            if (!Py_IsInitialized()) return;  // the interpreter is gone, and the object with it
            const py::gil_scoped_acquire gil;
            Py_DECREF(held);
          }};
}

}  // namespace deepcompile
