// SPDX-License-Identifier: Apache-2.0
#include "python_recorder.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>

#include "base/error.h"
#include "python_region.h"
#include "values.h"

namespace deepcompile {
namespace {

// Calls a method with the GIL held; torch's error of a device without memory is C++'s again.
template <typename... Args>
py::object call(const SharedObject& object, const char* method, Args&&... args) {
  try {
    return py::handle(object.get()).attr(method)(std::forward<Args>(args)...);
  } catch (py::error_already_set& error) {
    error.restore();
  }
  throw_python_error();
}

using GraphLaunch = int (*)(void* graph, void* stream);

GraphLaunch find_launch() {
  // Never closed: torch holds it anyway.
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  void* const symbol = library == nullptr ? nullptr : dlsym(library, "cuGraphLaunch");
  if (symbol == nullptr) throw UserError("[runtime] libcuda.so.1 has no function cuGraphLaunch");
  return reinterpret_cast<GraphLaunch>(symbol);
}

class GraphRun final : public RecordedRun {
 public:
  GraphRun(SharedObject graph, c10::Device device) : graph_(std::move(graph)), device_(device) {}

  void launch() override {
    if (exec_ != nullptr) return launch_exec();
    const py::gil_scoped_acquire gil;
    if (std::exchange(launched_, true)) {
      call(graph_, "replay");
      return;
    }
    exec_ = reinterpret_cast<void*>(call(graph_, "first").cast<uint64_t>());
  }

 private:
  void launch_exec() {
    const c10::Stream stream = c10::impl::VirtualGuardImpl(device_.type()).getStream(device_);
    static const GraphLaunch launch = find_launch();
    const int error = launch(exec_, stream.native_handle());
    if (error != 0) {
      throw UserError("[runtime] cuGraphLaunch failed with error " + std::to_string(error) +
                      ". The device is lost, or set compile.cuda_graphs to off.");
    }
  }

  SharedObject graph_;
  c10::Device device_;
  bool launched_ = false;
  void* exec_ = nullptr;
};

class PythonRecorder final : public RunRecorder {
 public:
  PythonRecorder(PyObject* recorder, c10::Device device)
      : recorder_(share(recorder)), device_(device) {}

  std::shared_ptr<void> begin() override {
    const py::gil_scoped_acquire gil;
    return share(call(recorder_, "begin").ptr());
  }

  at::Tensor allocate(int64_t bytes) override {
    const py::gil_scoped_acquire gil;
    return call(recorder_, "allocate", bytes).cast<at::Tensor>();
  }

  void prepare() override {
    const py::gil_scoped_acquire gil;
    call(recorder_, "prepare");
  }

  Recorded record(RegionCode& code, std::vector<RuntimeValue> inputs) override {
    const py::gil_scoped_acquire gil;
    // The list is gone when the code runs: what dies in it makes room for what it makes.
    call(recorder_, "start", py::reinterpret_steal<py::object>(list_to_python(inputs)));
    std::vector<RuntimeValue> outputs;
    try {
      const py::gil_scoped_release no_gil;
      outputs = code.run(std::move(inputs));
    } catch (...) {
      call(recorder_, "abort");
      throw;
    }
    const auto again = py::cpp_function([&code](const py::list& values) {
      std::vector<RuntimeValue> inputs = list_from_python(values.ptr(), "an input of a region");
      return py::reinterpret_steal<py::object>(list_to_python(code.run(std::move(inputs))));
    });
    const auto made = py::reinterpret_steal<py::object>(list_to_python(outputs));
    outputs.clear();
    const py::tuple found = call(recorder_, "finish", made, again);
    Recorded recorded;
    recorded.outputs = list_from_python(py::object(found[0]).ptr(), "a recorded output");
    recorded.run = std::make_unique<GraphRun>(share(py::object(found[1]).ptr()), device_);
    return recorded;
  }

  int64_t end() override {
    const py::gil_scoped_acquire gil;
    return call(recorder_, "end").cast<int64_t>();
  }

 private:
  SharedObject recorder_;
  c10::Device device_;
};

}  // namespace

std::shared_ptr<RunRecorder> make_python_recorder(PyObject* recorder, c10::Device device) {
  if (recorder == Py_None) return nullptr;
  return std::make_shared<PythonRecorder>(recorder, device);
}

}  // namespace deepcompile
