// SPDX-License-Identifier: Apache-2.0
// What else could have been chosen for each parameter and region, and what
// that would have cost: every single other choice is built and simulated, the
// rest of the plan as it is. Objects that are alike (equal layers' parameters
// and regions, treated alike) are asked about once.
#pragma once

#include <string>
#include <vector>

#include "passes/environment.h"

namespace deepcompile {

struct Alternative {
  std::vector<std::string> objects;  // parameters or regions; empty: the whole step
  std::string chosen;                // "kept whole from forward 0 to backward 0"
  std::string instead;               // "gathered again"
  Nanos time;                        // more a step than the plan takes
  Bytes peak;                        // more than the plan needs
  bool fits = true;                  // within the budget
};

// `plain` is the compute-only program that `plan` was made from by passes; the
// environment has an estimator and a simulator. Alternatives of parameters
// first, then of regions, then of the step.
std::vector<Alternative> next_best(const StepProgram& plain, const StepProgram& plan,
                                   const PassEnvironment& environment);

// "gathered again instead: +1.80 ms, -96.0 MiB".
std::string print(const Alternative& alternative);

}  // namespace deepcompile
