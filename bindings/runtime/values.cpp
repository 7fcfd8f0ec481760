// SPDX-License-Identifier: Apache-2.0
#include "values.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "base/error.h"

namespace deepcompile {

RuntimeValue from_python(PyObject* object, const char* where) {
  if (THPVariable_Check(object)) return THPVariable_Unpack(object);
  if (object == Py_None) return {};
  if (PyBool_Check(object)) return object == Py_True;
  if (PyFloat_Check(object)) return PyFloat_AsDouble(object);
  if (PyLong_Check(object)) {
    const int64_t value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  throw UserError(std::string("[runtime] ") + where + " is a " + Py_TYPE(object)->tp_name +
                  ". Regions exchange tensors, ints, floats, bools and None.");
}

std::vector<RuntimeValue> list_from_python(PyObject* sequence, const char* where) {
  const auto fast = py::reinterpret_steal<py::object>(
      PySequence_Fast(sequence, "a region's values must be a list or a tuple"));
  if (!fast) throw py::error_already_set();
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(fast.ptr());
  std::vector<RuntimeValue> values;
  values.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    values.push_back(from_python(PySequence_Fast_GET_ITEM(fast.ptr(), i), where));
  }
  return values;
}

PyObject* to_python(const RuntimeValue& value) {
  if (value.isTensor()) return THPVariable_Wrap(value.toTensor());  // None if undefined
  if (value.isBool()) return PyBool_FromLong(value.toBool());
  if (value.isInt()) return PyLong_FromLongLong(value.toInt());
  if (value.isDouble()) return PyFloat_FromDouble(value.toDouble());
  DC_CHECK(value.isNone(), "a runtime value is a tensor, a number, a bool or none");
  Py_RETURN_NONE;
}

PyObject* list_to_python(const std::vector<RuntimeValue>& values) {
  auto list = py::reinterpret_steal<py::object>(PyList_New(static_cast<Py_ssize_t>(values.size())));
  if (!list) throw py::error_already_set();
  for (size_t i = 0; i < values.size(); ++i) {
    PyObject* item = to_python(values[i]);
    if (item == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), item);
  }
  return list.release().ptr();
}

}  // namespace deepcompile
