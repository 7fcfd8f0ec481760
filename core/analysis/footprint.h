// SPDX-License-Identifier: Apache-2.0
// Bytes that one parameter takes on one rank, by purpose. The memory timeline
// and the simulator add these up; the runtime allocates them.
#pragma once

#include "ir/program.h"

namespace deepcompile {

struct ParamFootprint {
  // Always there.
  Bytes weights;  // the shard, or everything if whole or replicated
  Bytes master;   // fp32 copy that the optimizer works on, if the weights are narrower
  Bytes moments;  // Adam's two averages
  // From gather to release; zero unless sharded over several ranks.
  Bytes gathered;
  // From reduce to accumulate: what is sent, and what comes back. On one rank they are the same.
  Bytes reduction_input;
  Bytes reduction_result;
  // From accumulate to the update, which a `defer` puts off to the next step.
  // With one micro batch it is the result itself.
  Bytes gradient;
  // The same where several reductions of a step are added up.
  Bytes total;
  // Sum of a rank's own gradients, whole: from the first to the last reduce of
  // a step that reduces once (StepProgram::boundary) and has micro batches.
  Bytes local_sum;

  Bytes states() const { return master + moments; }  // what goes to the host and back
  Bytes resident() const { return weights + states(); }
};

ParamFootprint footprint(const StepProgram& program, ParamId id);

}  // namespace deepcompile
