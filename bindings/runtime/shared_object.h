// SPDX-License-Identifier: Apache-2.0
// A Python object that may be dropped on any thread, also after the interpreter is gone.
#pragma once

#include <Python.h>

#include <memory>

namespace deepcompile {

using SharedObject = std::shared_ptr<PyObject>;

// Takes a reference of its own. The GIL must be held.
SharedObject share(PyObject* object);

}  // namespace deepcompile
