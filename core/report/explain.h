// SPDX-License-Identifier: Apache-2.0
// A plan in words: for each parameter where it lives, when it is gathered,
// released and reduced, what that costs, and why.
#pragma once

#include <string>

#include "ir/program.h"
#include "sim/simulator.h"

namespace deepcompile {

// `result` is the simulation of `program`. Reasons that concern no parameter
// come at the end.
std::string explain(const StepProgram& program, const SimResult& result);

}  // namespace deepcompile
