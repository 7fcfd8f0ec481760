// SPDX-License-Identifier: Apache-2.0
// A recorder that is a Python object: deepcompile/cuda_graphs.py, and the tests' own.
//
//   begin() -> pool         what keeps the memory while it lives
//   allocate(bytes)         a 1-D tensor of uint8
//   prepare()               before start, on the thread that will call it
//   start(inputs)           before a region's code is called
//   finish(outputs, again) -> (outputs, graph)
//                           `again(inputs)` calls the code anew. graph.first()
//                           launches, and returns the address of a CUgraphExec
//                           for later launches, or 0: graph.replay() makes them
//   abort()                 the code raised
//   end() -> bytes
#pragma once

#include <Python.h>

#include <memory>

#include "runtime/exec/recorder.h"

namespace deepcompile {

// Null for None. The GIL must be held.
std::shared_ptr<RunRecorder> make_python_recorder(PyObject* recorder, c10::Device device);

}  // namespace deepcompile
