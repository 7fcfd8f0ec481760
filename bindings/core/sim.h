// SPDX-License-Identifier: Apache-2.0
// A simulation's result with the program it is of, for Python.
#pragma once

#include <memory>

#include "bind.h"
#include "sim/simulator.h"

namespace deepcompile::bindings {

struct Simulated {
  std::shared_ptr<const StepProgram> program;  // as it was when simulated
  SimResult result;
};

}  // namespace deepcompile::bindings
