// SPDX-License-Identifier: Apache-2.0
// A plan in words: for each parameter where it lives, when it is gathered,
// released and reduced, what that costs, and why.
#pragma once

#include <string>
#include <vector>

#include "ir/program.h"
#include "report/next_best.h"
#include "sim/simulator.h"

namespace deepcompile {

// `result` is the simulation of `program`. Reasons that concern no parameter
// come at the end. `alternatives` (see next_best.h) are told with the objects
// that they are about.
std::string explain(const StepProgram& program, const SimResult& result,
                    const std::vector<Alternative>& alternatives = {});

}  // namespace deepcompile
