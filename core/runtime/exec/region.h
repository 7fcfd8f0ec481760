// SPDX-License-Identifier: Apache-2.0
// Region code: a compiled piece of the graph, whoever hosts it.
#pragma once

#include <ATen/core/ivalue.h>

#include <vector>

namespace deepcompile {

// What flows between regions: a tensor, an integer or float of the graph's
// shapes, a bool, or nothing (a gradient that does not exist).
using RuntimeValue = c10::IValue;

class RegionCode {
 public:
  virtual ~RegionCode() = default;
  // Takes the inputs, so that their memory can go while the code runs. Called
  // without the GIL, on the thread and current stream of the section.
  virtual std::vector<RuntimeValue> run(std::vector<RuntimeValue> inputs) = 0;
};

}  // namespace deepcompile
