// SPDX-License-Identifier: Apache-2.0
#include "analysis/step_machine.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "base/lists.h"

namespace deepcompile {

StepMachine::StepMachine(const StepProgram& program)
    : program_(program),
      liveness_(analyze_liveness(program)),
      sums_locally_(program.boundary && program.accumulation > 1),
      adopts_(program.params.size(), program.accumulation == 1),
      params_(program.params.size()),
      values_(program.values.size()) {
  footprints_.reserve(params_.size());
  for (size_t i = 0; i < params_.size(); ++i) {
    footprints_.push_back(footprint(program, ParamId{static_cast<uint32_t>(i)}));
    params_[i].whole = program.params[i].placement != Placement::kSharded;
  }
  // Here, as the program's table is large and visited again and again.
  for (size_t i = 0; i < values_.size(); ++i) values_[i].bytes = program.values[i].bytes.value;
  std::vector<bool> reduced(params_.size(), false);
  for (const Section& section : program.sections) {
    for (const Instr& instr : section.instrs) {
      if (instr.op != Op::kReduce) continue;
      foreign_gradients_ = false;
      const size_t id = index(*instr.param);
      if (reduced[id]) {  // by several graphs
        adopts_[id] = false;
        footprints_[id].gradient = footprints_[id].total;
      }
      reduced[id] = true;
    }
  }
  plan_sections();
}

void StepMachine::plan_sections() {
  sections_.resize(program_.sections.size());
  for (size_t s = 0; s < sections_.size(); ++s) {
    const Section& section = program_.sections[s];
    SectionPlan& plan = sections_[s];
    for (ValueId id : section.inputs) {
      const auto& saved = liveness_.sections[s].saved;  // sorted
      if (contains(section.outputs, id) || std::binary_search(saved.begin(), saved.end(), id))
        continue;
      plan.dead_inputs.push_back(id);
    }
    const bool forward = section.kind == SectionKind::kForward;
    if (forward && program_.find_section(SectionKind::kBackward, section.graph)) {
      plan.held = section.outputs;
      continue;
    }
    plan.dropped = section.outputs;
    if (section.kind != SectionKind::kBackward) continue;
    const auto its = program_.find_section(SectionKind::kForward, section.graph);
    const auto& kept = program_.sections[index(*its)].outputs;
    plan.dropped.insert(plan.dropped.end(), kept.begin(), kept.end());
  }
}

void StepMachine::run(StepEvents& events, int64_t micro_batches) {
  events_ = &events;
  before_ = params_;
  for (int64_t micro = 0; micro <= micro_batches; ++micro) {
    const bool updates = micro == micro_batches;
    last_ = micro + 1 >= micro_batches;
    for (size_t s = 0; s < program_.sections.size(); ++s) {
      const bool is_update = program_.sections[s].kind == SectionKind::kUpdate;
      if (is_update == updates) run_section(s, updates ? 0 : micro);
    }
  }
  events_ = nullptr;
}

void StepMachine::run_section(size_t at, int64_t micro_batch) {
  const Section& section = program_.sections[at];
  kind_ = section.kind;
  events_->begin_section(kind_);
  for (ValueId id : section.inputs) make(id);
  for (size_t i = 0; i < section.instrs.size(); ++i) {
    const Instr& instr = section.instrs[i];
    events_->begin(at, i, micro_batch);
    step(instr);
    int64_t freed = 0;
    for (ValueId id : liveness_.sections[at].frees[i]) freed += drop(id);
    if (freed != 0) events_->memory(MemoryPart::kValues, -freed);
    if (std::exchange(stages_after_, false)) {
      events_->memory(MemoryPart::kReductions, bytes(instr).reduction_input.value);
    }
    events_->end();
  }
  for (ValueId id : sections_[at].dead_inputs) free(id);
  for (ValueId id : sections_[at].held) hold(id);
  for (ValueId id : sections_[at].dropped) give_up(id);
}

void StepMachine::step(const Instr& instr) {
  switch (instr.op) {
    case Op::kGather:
      return gather(instr);
    case Op::kWait:
      DC_CHECK(state(instr).whole, "verified programs gather before they wait");
      return events_->wait(slot(instr, kWholeSlot));
    case Op::kRelease:
      return release(instr);
    case Op::kRun:
      return run_region(program_.region(*instr.region), instr);
    case Op::kReduce:
      return reduce(instr);
    case Op::kAccumulate:
      return accumulate(instr);
    case Op::kNorm:
      return events_->kernel(Op::kNorm, instr);
    case Op::kUpdate:
      return update(instr);
    case Op::kDefer:
      state(instr).deferred = state(instr).gradient;
      return;
    case Op::kOffloadStates:
    case Op::kEvictStates:
    case Op::kReloadStates:
    case Op::kAwaitStates:
      return move_states(instr);
    case Op::kOffload:
    case Op::kEvict:
    case Op::kReload:
    case Op::kAwait:
      return step_values(instr);
  }
}

// A gather applies what was deferred first; of what is whole it is nothing.
void StepMachine::gather(const Instr& instr) {
  ParamState& s = state(instr);
  if (s.deferred) apply_update(instr);
  if (std::exchange(s.whole, true)) return;
  const int64_t full = bytes(instr).gathered.value;  // 0 if not sharded
  if (full != 0 && !std::exchange(s.allocated, true)) events_->memory(MemoryPart::kGathered, full);
  events_->transfer(Resource::kLink, Op::kGather, instr);
  events_->mark(slot(instr, kWholeSlot));
}

void StepMachine::release(const Instr& instr) {
  ParamState& s = state(instr);
  s.whole = false;
  if (!std::exchange(s.allocated, false)) return;
  events_->memory(MemoryPart::kGathered, -bytes(instr).gathered.value);
}

// The transfer reads the gradient where it is if that is one tensor of the
// right size; otherwise gradients are copied into a staging buffer first. A
// full-size sum is sent as it is, or converted.
void StepMachine::reduce(const Instr& instr) {
  ParamState& s = state(instr);
  const ParamFootprint& of = bytes(instr);
  const int64_t sum = of.local_sum.value, input = of.reduction_input.value;
  if (sums_locally_ && (!last_ || s.sum)) {
    if (!std::exchange(s.sum, true)) events_->memory(MemoryPart::kGradients, sum);
    events_->kernel(Op::kReduce, instr);
    if (!last_) return;
    if (sum == input) events_->memory(MemoryPart::kGradients, -sum);
    events_->memory(MemoryPart::kReductions, input);
    if (sum != input) events_->memory(MemoryPart::kGradients, -sum);
    s.sum = false;
  } else {
    stages_after_ = is_in_place(instr);
    if (!stages_after_) {
      events_->memory(MemoryPart::kReductions, input);
      events_->stage(instr);
    }
  }
  events_->memory(MemoryPart::kReductions, result_bytes(instr));
  events_->transfer(Resource::kLink, Op::kReduce, instr);
  events_->mark(slot(instr, kReducedSlot));
}

bool StepMachine::is_in_place(const Instr& instr) const {
  return instr.values.size() == 1 && program_.rows_read(*instr.param) == 0 &&
         program_.value(instr.values[0]).bytes == bytes(instr).reduction_input;
}

void StepMachine::accumulate(const Instr& instr) {
  if (sums_locally_ && !last_) return;
  ParamState& s = state(instr);
  const ParamFootprint& of = bytes(instr);
  events_->wait(slot(instr, kReducedSlot));
  const bool adopts = adopts_[index(*instr.param)];
  const int64_t sent = of.reduction_input.value, came = result_bytes(instr);
  // What becomes the gradient is not there twice.
  const int64_t adopted = !adopts ? 0 : program_.world == 1 ? sent : came;
  events_->memory(MemoryPart::kReductions, -adopted);
  if (!std::exchange(s.gradient, true)) {
    events_->memory(MemoryPart::kGradients, of.gradient.value);
  }
  events_->kernel(Op::kAccumulate, instr);
  events_->memory(MemoryPart::kReductions, adopted - sent - came);
}

// Applies a gradient that is complete and due; otherwise nothing.
void StepMachine::update(const Instr& instr) {
  const ParamState& s = state(instr);
  const bool complete = s.gradient || foreign_gradients_;
  const bool due = kind_ == SectionKind::kUpdate    ? complete
                   : kind_ == SectionKind::kForward ? s.deferred
                                                    : last_ && s.gradient;
  if (due) apply_update(instr);
}

void StepMachine::apply_update(const Instr& instr) {
  ParamState& s = state(instr);
  if (s.states == Home::kHost) {
    states_memory(instr, 1);
    events_->transfer(Resource::kToDevice, Op::kReloadStates, instr);
    events_->mark(slot(instr, kStatesSlot));
  }
  if (s.states != Home::kDevice) events_->wait(slot(instr, kStatesSlot));
  s.states = Home::kDevice;
  events_->kernel(Op::kUpdate, instr);
  if (std::exchange(s.gradient, false)) {
    events_->memory(MemoryPart::kGradients, -bytes(instr).gradient.value);
  }
  s.deferred = false;
  if (program_.param(*instr.param).placement != Placement::kReplicated) s.whole = false;
}

void StepMachine::run_region(const Region& region, const Instr& instr) {
  const int64_t workspace = region.workspace.value;
  if (workspace != 0) events_->memory(MemoryPart::kWorkspace, workspace);
  int64_t made = 0;  // in one piece: nothing is freed between
  for (ValueId id : region.outputs) made += renew(id);
  if (made != 0) events_->memory(MemoryPart::kValues, made);
  events_->kernel(Op::kRun, instr);
  if (workspace != 0) events_->memory(MemoryPart::kWorkspace, -workspace);
}

// Moves of what is not where they start from do nothing.
void StepMachine::move_states(const Instr& instr) {
  Home& home = state(instr).states;
  if (instr.op == Op::kOffloadStates && home == Home::kDevice) {
    events_->transfer(Resource::kToHost, instr.op, instr);
    events_->mark(slot(instr, kStatesSlot));
    home = Home::kLeaving;
  } else if (instr.op == Op::kEvictStates && home == Home::kLeaving) {
    events_->wait(slot(instr, kStatesSlot));
    states_memory(instr, -1);
    home = Home::kHost;
  } else if (instr.op == Op::kReloadStates && home == Home::kHost) {
    states_memory(instr, 1);
    events_->transfer(Resource::kToDevice, instr.op, instr);
    events_->mark(slot(instr, kStatesSlot));
    home = Home::kComing;
  } else if (instr.op == Op::kAwaitStates && home == Home::kComing) {
    events_->wait(slot(instr, kStatesSlot));
    home = Home::kDevice;
  }
}

void StepMachine::states_memory(const Instr& instr, int sign) {
  events_->memory(MemoryPart::kMasters, sign * bytes(instr).master.value);
  events_->memory(MemoryPart::kMoments, sign * bytes(instr).moments.value);
}

// One copy for all values of the list.
void StepMachine::step_values(const Instr& instr) {
  const bool out = instr.op == Op::kOffload, in = instr.op == Op::kReload;
  if (out || in) {
    for (ValueId id : instr.values) {
      values_[index(id)].home = out ? Home::kLeaving : Home::kComing;
      if (in) events_->memory(MemoryPart::kValues, values_[index(id)].bytes);
    }
    events_->transfer(traits(instr.op).resource, instr.op, instr);
    for (ValueId id : instr.values) events_->mark(slot(id));
    return;
  }
  for (ValueId id : instr.values) {
    events_->wait(slot(id));
    const bool evict = instr.op == Op::kEvict;
    values_[index(id)].home = evict ? Home::kHost : Home::kDevice;
    if (evict) events_->memory(MemoryPart::kValues, -values_[index(id)].bytes);
  }
}

// A value made again (recomputed, or the next micro batch's) replaces the old
// one; but what the caller holds stays his.
int64_t StepMachine::renew(ValueId id) {
  ValueState& value = values_[index(id)];
  const bool replaces = value.alive && value.home != Home::kHost && !value.shared;
  value.alive = true;
  value.home = Home::kDevice;
  value.shared = false;
  return replaces ? 0 : value.bytes;
}

int64_t StepMachine::drop(ValueId id) {
  ValueState& value = values_[index(id)];
  if (!std::exchange(value.alive, false)) return 0;
  return value.home != Home::kHost && !value.shared ? value.bytes : 0;
}

void StepMachine::make(ValueId id) {
  const int64_t bytes = renew(id);
  if (bytes != 0) events_->memory(MemoryPart::kValues, bytes);
}

void StepMachine::free(ValueId id) {
  const int64_t bytes = drop(id);
  if (bytes != 0) events_->memory(MemoryPart::kValues, -bytes);
}

void StepMachine::hold(ValueId id) {
  ValueState& value = values_[index(id)];
  if (!value.alive || value.held) return;
  value.held = value.shared = true;
}

void StepMachine::give_up(ValueId id) {
  ValueState& value = values_[index(id)];
  const bool held = std::exchange(value.held, false);
  const bool shared = std::exchange(value.shared, false);
  const bool his_alone = held && !(value.alive && shared);
  if (his_alone && value.bytes != 0) events_->memory(MemoryPart::kValues, -value.bytes);
  free(id);
}

}  // namespace deepcompile
