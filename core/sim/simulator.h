// SPDX-License-Identifier: Apache-2.0
// Discrete-event run of a step program: time, peak bytes, stalls.
//
// It follows the runtime's rules (StepMachine). One compute queue runs a
// section's instructions in order. Each transfer queue (the link between
// ranks, to the host, to the device) carries one transfer at a time, in issue
// order: a transfer starts when compute has reached it and its queue is free,
// and compute goes on at once. A wait stops compute until the parameter is
// whole, an accumulate until the reduction is done, an evict or an await until
// the copy is. Before a section compute does nothing for as long as the
// estimator says that the user's code takes; before a reduction whose gradient
// is not what goes on the wire it copies that into a buffer. Kernels slow down by the estimator's
// factor for as long as a transfer between ranks runs beside them; copies to and from the host
// don't slow them. While both directions of the host link are busy each keeps the estimator's
// fraction of its speed, so a copy issued later may delay one of the other direction.
//
// The forward and backward sections run `accumulation` times in their order,
// then the update once. What is reported is a step of the steady state: it
// starts with what the step before left whole, deferred, on the host or still
// in flight, and its time is that from its start to the next step's, with all
// queues' work paid for. (Almost every program is there after one step; one
// that is not after a few is reported as it is then.)
//
// Callers: the planner (is an edit worth it?), the command line, the report.
// Deterministic: the same program and estimator give the same result.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/units.h"
#include "cost/cost_model.h"
#include "ir/program.h"
#include "passes/environment.h"

namespace deepcompile {

// One piece of work of one execution of an instruction. Most have one; a
// gather that applies a deferred update has several, one after the other.
struct SimItem {
  uint32_t section = 0;
  uint32_t instr = 0;
  uint32_t micro_step = 0;  // which of the `accumulation` repeats; 0 in the update
  Op op = Op::kRun;         // what was done: the instruction's own, or e.g. a deferred update
  Resource resource = Resource::kNone;
  Nanos issue;  // when compute reached it; times are from the step's start
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
  Nanos time;  // from this step's start to the next one's
  Bytes peak;
  Bytes resident;  // what is there at the start: shards, states, whole parameters
  Nanos compute_busy;
  Nanos link_busy;
  // What is in flight at the end counts as if nothing followed it.
  Nanos to_host_busy, to_device_busy;
  Nanos stall;                      // sum over items
  std::vector<SimItem> items;       // in issue order
  std::vector<MemoryPoint> memory;  // one point per time at which it changes; the first is at 0
};

// Verifies the program first. Throws UserError if it is not valid.
SimResult simulate(const StepProgram& program, const Estimator& estimator);

// Time and peak alone, several times as fast: for planners that try many
// programs. Does not verify: `program` has passed verify.
SimSummary simulate_summary(const StepProgram& program, const Estimator& estimator);

// "run fwd.0", "gather embed", "offload h.3 and 2 more": how reports name an instruction.
std::string instr_label(const StepProgram& program, const Instr& instr);
// The same for what one item did, e.g. "update embed" for a gather's.
std::string item_label(const StepProgram& program, const SimItem& item);

}  // namespace deepcompile
