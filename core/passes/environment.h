// SPDX-License-Identifier: Apache-2.0
// What passes may know of the machine they plan for. The caller of the
// pipeline fills it in; passes only read it. All of it is optional: a pass
// that cannot do without a part says so in an error.
#pragma once

#include <optional>
#include <string_view>

#include "analysis/memory_timeline.h"
#include "cost/cost_model.h"
#include "ir/program.h"

namespace deepcompile {

// A simulated step in two numbers. core/sim comes after core/passes, so the
// simulator is handed in. Its peak is that of the memory timeline: buffers come and go as compute
// reaches them, whenever that is.
struct SimSummary {
  Nanos time;
  Bytes peak;
};

struct PassEnvironment {
  std::optional<Bytes> memory_budget;    // most bytes of one rank
  const Estimator* estimator = nullptr;  // not owned; outlives the run
  // Null where steps cannot be simulated; needs the estimator.
  SimSummary (*simulator)(const StepProgram&, const Estimator&) = nullptr;
  // Whether a backward may update: nothing reads the gradients after it, and no
  // step is skipped once its last backward has begun.
  bool early_updates = false;
  // The plan that holds while this one is made, with its reasons, for passes that choose all at
  // once: they do no worse than it. Not owned; outlives the run.
  const StepProgram* held = nullptr;
  bool reasons = true;  // off for trials whose reasons nobody will read

  // Of a program that passes verify.
  SimSummary simulate(const StepProgram& program) const { return simulator(program, *estimator); }
};

// The program's memory timeline. Throws UserError, in the name of `pass` and
// with the numbers, if its peak is above the budget already.
// `known` is that timeline where the caller has it already.
MemoryTimeline timeline_within(const StepProgram& program, std::optional<Bytes> budget,
                               std::string_view pass, const MemoryTimeline* known = nullptr);

// "run fwd.3 in forward 0": an instruction by its point of the timeline.
std::string point_name(const StepProgram& program, const MemoryAt& at);

}  // namespace deepcompile
