// SPDX-License-Identifier: Apache-2.0
// What passes may know of the machine they plan for. The caller of the
// pipeline fills it in; passes only read it. All of it is optional: a pass
// that cannot do without a part says so in an error.
#pragma once

#include <functional>
#include <optional>
#include <string_view>

#include "analysis/memory_timeline.h"
#include "cost/cost_model.h"
#include "ir/program.h"

namespace deepcompile {

// A simulated step in two numbers. core/sim comes after core/passes, so the
// simulator is handed in.
struct SimSummary {
  Nanos time;
  Bytes peak;
};

struct PassEnvironment {
  std::optional<Bytes> memory_budget;                        // most bytes of one rank
  const Estimator* estimator = nullptr;                      // not owned; outlives the run
  std::function<SimSummary(const StepProgram&)> simulate{};  // of programs that pass verify
  // Whether a backward may update: nothing reads the gradients after it, and no
  // step is skipped once its last backward has begun.
  bool early_updates = false;
  // The plan that holds while this one is made, with its reasons, for passes that choose all at
  // once: they do no worse than it. Not owned; outlives the run.
  const StepProgram* held = nullptr;
  bool reasons = true;  // off for trials whose reasons nobody will read
};

// The program's memory timeline. Throws UserError, in the name of `pass` and
// with the numbers, if its peak is above the budget already.
// `known` is that timeline where the caller has it already.
MemoryTimeline timeline_within(const StepProgram& program, std::optional<Bytes> budget,
                               std::string_view pass, const MemoryTimeline* known = nullptr);

// The peak of the program's memory timeline, or that of the simulated step if
// there is a simulator and it is larger.
Bytes peak_of(const StepProgram& program, const PassEnvironment& environment);

// "run fwd.3 in forward 0": an instruction by its point of the timeline.
std::string point_name(const StepProgram& program, const MemoryAt& at);

}  // namespace deepcompile
