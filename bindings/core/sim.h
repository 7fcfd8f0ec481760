// SPDX-License-Identifier: Apache-2.0
// A simulation's result with the program it is of, for Python, and the
// estimator that Python's arguments ask for.
#pragma once

#include <memory>

#include "bind.h"
#include "cost/measured_costs.h"
#include "sim/simulator.h"

namespace deepcompile::bindings {

struct Simulated {
  std::shared_ptr<const StepProgram> program;  // as it was when simulated
  SimResult result;
};

// The machine's numbers, with measurements (if not null) in their place.
inline std::unique_ptr<const Estimator> estimator_of(const Machine& machine,
                                                     const CostTable* costs) {
  if (costs == nullptr) return std::make_unique<const MachineCosts>(machine);
  return std::make_unique<const MeasuredCosts>(machine, *costs);
}

}  // namespace deepcompile::bindings
