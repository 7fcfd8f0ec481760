// SPDX-License-Identifier: Apache-2.0
// Runtime values to and from Python. The GIL must be held.
#pragma once

#include <Python.h>

#include <vector>

#include "runtime/exec/region.h"

namespace deepcompile {

// Tensors, ints, floats, bools and None. Throws UserError on anything else,
// naming `where` (a phrase such as "an input of call 3").
RuntimeValue from_python(PyObject* object, const char* where);
std::vector<RuntimeValue> list_from_python(PyObject* sequence, const char* where);

// New references.
PyObject* to_python(const RuntimeValue& value);
PyObject* list_to_python(const std::vector<RuntimeValue>& values);

}  // namespace deepcompile
