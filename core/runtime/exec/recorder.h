// SPDX-License-Identifier: Apache-2.0
// RunRecorder: records the kernels that a region starts, so that they can be
// started again without its host code. On a GPU: CUDA graphs.
//
// Memory that is allocated for a recording comes from a pool of its own. What
// dies there is used again by later runs of the recording only, and a run that
// is started again writes where it wrote before. So all of a recording's runs
// are started again in their order, or left out; Replays sees to that.
//
// Implemented by the bindings; tests have one for CPUs.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/exec/region.h"

namespace deepcompile {

class RecordedRun {
 public:
  virtual ~RecordedRun() = default;
  virtual void launch() = 0;  // on the current stream
};

class RunRecorder {
 public:
  struct Recorded {
    std::vector<RuntimeValue> outputs;
    std::unique_ptr<RecordedRun> run;
  };

  virtual ~RunRecorder() = default;
  // A new pool; its memory stays while the result lives. Gives unused memory of others back.
  virtual std::shared_ptr<void> begin() = 0;
  // `bytes` of the pool, as an own tensor of bytes.
  virtual at::Tensor allocate(int64_t bytes) = 0;
  // What this thread's next run needs beside its own memory.
  virtual void prepare() = 0;
  // The outputs' memory is there, their values are not before a launch. Throws
  // c10::OutOfMemoryError, or any other error if the code cannot be recorded: it
  // then has no effect.
  virtual Recorded record(RegionCode& code, std::vector<RuntimeValue> inputs) = 0;
  // No more is recorded: bytes that the pool holds, and that tensors do not.
  virtual int64_t end() = 0;
};

}  // namespace deepcompile
