// SPDX-License-Identifier: Apache-2.0
// Discrete-event run of a step program: time, peak bytes, stalls.
//
// It follows the runtime's rules. One compute queue runs a section's
// instructions in order; one link carries one transfer at a time, in issue
// order. A gather or a reduce starts when compute has reached it and the link
// is free, and compute goes on at once. A wait stops compute until the
// parameter is whole, an accumulate until the reduction is done. Kernels slow
// down by the estimator's factor for as long as a transfer runs beside them.
//
// The forward and backward sections run `accumulation` times in their order,
// then the update once. At the start, parameters that are whole or replicated
// are valid and sharded ones are not. The step ends when both queues are idle.
//
// Callers: the planner (is an edit worth it?), the command line, the report.
// Deterministic: the same program and estimator give the same result.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "base/units.h"
#include "cost/cost_model.h"
#include "ir/program.h"

namespace deepcompile {

// What one instruction did, each time it ran.
struct SimItem {
  uint32_t section = 0;
  uint32_t instr = 0;
  uint32_t micro_step = 0;  // which of the `accumulation` repeats; 0 in the update
  Resource resource = Resource::kNone;
  Nanos issue;  // when compute reached it
  Nanos start;  // when it began to use its resource; issue <= start <= end
  Nanos end;
  Nanos stall;  // how long compute stood still for it: waits and accumulates
};

struct MemoryPoint {
  Nanos time;
  Bytes bytes;  // allocated from this time on

  bool operator==(const MemoryPoint&) const = default;
};

struct SimResult {
  Nanos time;
  Bytes peak;
  Bytes resident;  // what is allocated at the start: shards, states, whole parameters
  Nanos compute_busy;
  Nanos link_busy;
  Nanos stall;                      // sum over items
  std::vector<SimItem> items;       // in issue order
  std::vector<MemoryPoint> memory;  // one point per time at which it changes; the first is at 0
};

// Verifies the program first. Throws UserError if it is not valid.
SimResult simulate(const StepProgram& program, const Estimator& estimator);

// "run fwd.0", "gather embed", "norm": how reports name an instruction.
std::string instr_label(const StepProgram& program, const Instr& instr);

}  // namespace deepcompile
