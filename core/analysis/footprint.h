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
  // From gather to release; zero unless sharded.
  Bytes gathered;
  // From reduce to accumulate: what is sent, and what comes back.
  Bytes reduction_input;
  Bytes reduction_result;
  // From accumulate to update. With one micro batch it is the result itself.
  Bytes gradient;

  Bytes resident() const { return weights + master + moments; }
};

ParamFootprint footprint(const StepProgram& program, ParamId id);

}  // namespace deepcompile
