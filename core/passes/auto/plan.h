// SPDX-License-Identifier: Apache-2.0
// `auto`: plans the whole step under the memory budget. From the compute-only
// program it chooses, all at once,
//   - the classical pass, by the placements: zero0, zero1 or zero3_compile;
//   - regions to recompute, activations and optimizer states to offload;
//   - parameters to keep whole between uses, and how far to gather ahead;
//   - where the optimizer runs, and the order of transfers on the link.
// It starts from the classical plan, proposes edits, builds each by the passes
// themselves with explicit options, asks the simulator for time and peak, and
// keeps what helps. See auto_search.h for the order of the proposals.
//
// The result's simulated peak is within the budget, and it is never slower
// than the classical plan where that is within the budget too, nor than the
// plan that holds (PassEnvironment::held). The number of
// simulations depends on the program's size and on whether a plan holds: the
// same program, machine, budget and plan that holds give the same plan.
#pragma once

#include "passes/pass.h"

namespace deepcompile {

struct AutoOptions {
  int simulations = 0;  // most of the search by levels and toggles; 0: by the program's size
};

class AutoPlan final : public Pass {
 public:
  explicit AutoPlan(AutoOptions options = {}) : options_(options) {}

  std::string_view name() const override { return "auto"; }
  std::string_view summary() const override {
    return "choose all of the below for the fastest simulated step within the memory budget";
  }
  Contract contract() const override;
  // Throws UserError without a machine; if a region has no time; or, with the
  // numbers, if nothing brings the peak within the budget.
  void run(StepProgram& program, PassContext& context) const override;

 private:
  AutoOptions options_;
};

}  // namespace deepcompile
