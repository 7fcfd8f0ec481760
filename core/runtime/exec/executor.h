// SPDX-License-Identifier: Apache-2.0
// Executor: walks one section of a loaded plan.
//
// It decides nothing: every instruction, its order and what dies after it are
// the plan's. Only where the device is out of memory it steps in: see Relief.
// Instructions that stand together and concern one stream are given to it together (see
// Batch), unless someone wants to know how long each takes.
// An error inside a section leaves the runtime usable: transfers under way are
// ended, what the section gathered is given back, the call's values are
// dropped.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/error.h"
#include "runtime/comm/transport.h"
#include "runtime/exec/call_table.h"
#include "runtime/exec/loaded_plan.h"
#include "runtime/exec/relief.h"
#include "runtime/exec/replays.h"
#include "runtime/memory/memory_meter.h"
#include "runtime/memory/param_store.h"
#include "runtime/offload/state_mover.h"
#include "runtime/offload/value_mover.h"
#include "runtime/optimizer/sharded_adam.h"
#include "runtime/trace.h"

namespace deepcompile {

// An instruction found no memory on the device, and nothing was left to move away.
class OutOfMemory : public UserError {
 public:
  using UserError::UserError;
};

// What the executor works on; all owned by the runtime.
struct ExecutorParts {
  ParamStore& store;
  ShardedAdam& optimizer;
  StateMover& states;
  ValueMover& values;
  Relief& relief;
  Replays& replays;
  MemoryMeter& meter;
  Tracer& tracer;
};

class Executor {
 public:
  Executor(const ExecutorParts& parts, Transport& transport, int64_t rank, c10::Device device);

  // Runs a section on `frame`. Inputs must be in their slots; outputs are there
  // afterwards. `open_calls`: those between forward and backward, its own with them.
  // Throws UserError naming rank and instruction if a transfer fails.
  void run(const LoadedPlan& loaded, size_t section, Frame* frame, size_t open_calls);

  // Whether the micro batch under way is its step's last: its gradients are complete.
  void set_last_micro_batch(bool last) { last_micro_batch_ = last; }

 private:
  // Where the executor is, for messages and traces.
  struct Place {
    const LoadedPlan* loaded;
    size_t section;
    size_t instr;
    const PlanSection& part() const { return loaded->plan.sections[section]; }
    const PlanInstr& get() const { return part().instrs[instr]; }
    ParamState* param() const {
      return get().param < 0 ? nullptr : loaded->params[static_cast<size_t>(get().param)];
    }
  };
  using Inputs = std::vector<RuntimeValue>;
  // A region's inputs over its attempts.
  struct HeldInputs {
    std::optional<Inputs> inputs;
    bool kept = false;  // until it has run, so that it can run again
  };

  void step(const Place& place, Frame* frame);
  // Ends the batch under way, if there is one and this instruction is not of it, and
  // begins one with it if it can.
  void batch_for(const PlanInstr& instr);
  void end_batch();
  // Until it succeeds, making room after each allocation that failed.
  void perform_with_relief(const Place& place, Frame* frame, const std::shared_ptr<Span>& span);
  void perform(const Place& place, Frame* frame, const std::shared_ptr<Span>& span,
               HeldInputs* held);
  void move_states(const PlanInstr& instr, ParamState& param, const std::shared_ptr<Span>& span);
  void move_values(const PlanInstr& instr, Frame* frame, const std::shared_ptr<Span>& span);
  void gather(const Place& place, Frame* frame, const std::shared_ptr<Span>& span);
  std::shared_ptr<RowSet> rows_at(const Place& place, Frame* frame) const;
  void update(SectionKind kind, ParamState& param);
  void reduce(const Place& place, Frame* frame, const std::shared_ptr<Span>& span);
  void accumulate(const Place& place);
  void run_region(const Place& place, Frame* frame, const std::shared_ptr<Span>& span,
                  HeldInputs* held);
  Inputs region_inputs(const Place& place, Frame* frame);
  Inputs run_code(const Place& place, const std::shared_ptr<Span>& span, Inputs inputs);

  bool sums_locally(const Place& place) const;
  bool on_compute(const Place& place) const;
  void check_limit(const Place& place, const Frame& frame) const;
  int64_t coming_bytes(const Place& place, const Frame& frame) const;
  std::set<int32_t> used_slots(const Place& place) const;
  std::set<const ParamState*> used_params(const Place& place) const;  // may hold null
  const ParamState* user_of_states(const Place& place) const;         // null: it touches none
  void recover(bool reachable);
  std::string describe(const Place& place) const;

  Transport& transport_;
  ParamStore& store_;
  ShardedAdam& optimizer_;
  StateMover& states_;
  ValueMover& values_;
  Relief& relief_;
  Replays& replays_;
  MemoryMeter& meter_;
  Tracer& tracer_;
  int64_t rank_;
  c10::Device device_;
  bool last_micro_batch_ = true;
  std::vector<ParamState*> gathered_;  // by this section, not yet released
  bool may_batch_ = false;             // nobody traces, and memory is not short
  Batch batch_ = Batch::kNone;
};

}  // namespace deepcompile
