// SPDX-License-Identifier: Apache-2.0
#include "runtime/exec/executor.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/add.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace deepcompile {
namespace {

std::optional<c10::Stream> current_stream(c10::Device device) {
  if (device.is_cpu()) return std::nullopt;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

// Which batch an instruction may be in. Those by rows run kernels of their own.
Batch batch_of(const PlanInstr& instr) {
  switch (instr.op) {
    case Op::kRelease:
    case Op::kAccumulate:
    case Op::kUpdate:
    case Op::kDefer:
      return Batch::kWaits;
    case Op::kGather:
    case Op::kReduce:
      return instr.rows < 0 ? Batch::kTransfers : Batch::kNone;
    default:
      return Batch::kNone;
  }
}

}  // namespace

Executor::Executor(const ExecutorParts& parts, Transport& transport, int64_t rank,
                   c10::Device device)
    : transport_(transport),
      store_(parts.store),
      optimizer_(parts.optimizer),
      states_(parts.states),
      values_(parts.values),
      relief_(parts.relief),
      replays_(parts.replays),
      meter_(parts.meter),
      tracer_(parts.tracer),
      rank_(rank),
      device_(device) {}

void Executor::run(const LoadedPlan& loaded, size_t section, Frame* frame, size_t open_calls) {
  Place place{&loaded, section, 0};
  gathered_.clear();
  relief_.look(replays_.bytes());
  may_batch_ = !tracer_.on() && !relief_.limited() && !relief_.armed();
  replays_.begin_section(loaded, section, open_calls, /*may_record=*/may_batch_);
  try {
    const size_t count = place.part().instrs.size();
    for (; place.instr < count; ++place.instr) step(place, frame);
    end_batch();
    for (const int32_t slot : place.part().outputs) values_.fetch(frame, slot);
  } catch (const TransportError& error) {
    const std::string text = "[runtime] rank " + std::to_string(rank_) + ": " + describe(place) +
                             " failed: " + error.what() + kPeerAdvice;
    recover(/*reachable=*/false);
    throw UserError(text);
  } catch (...) {
    recover(/*reachable=*/true);
    throw;
  }
}

void Executor::recover(bool reachable) {
  replays_.fail_section();
  try {
    end_batch();  // the peers count on it
  } catch (const std::exception&) {
    reachable = false;  // the first failure is already on its way to the user
  }
  store_.abandon_transfers(reachable);
  for (ParamState* param : gathered_) {
    // Also what relief sent away: the other ranks, which have it, gather it anew.
    const bool whole = param->full.defined() || param->full_is_away();
    if (whole && param->placement == Placement::kSharded) param->drop_full();
  }
  gathered_.clear();
}

// Transfers and host copies time themselves, on the link and on their stream.
bool Executor::on_compute(const Place& place) const {
  switch (traits(place.get().op).resource) {
    case Resource::kLink:
    case Resource::kToHost:
    case Resource::kToDevice:
      return place.get().op == Op::kReduce && sums_locally(place);
    default:
      return true;
  }
}

void Executor::step(const Place& place, Frame* frame) {
  const std::shared_ptr<Span> span = tracer_.open(
      {place.loaded->id, static_cast<int64_t>(place.section), static_cast<int64_t>(place.instr)});
  const bool here = span && on_compute(place);
  if (here) span->start(current_stream(device_));
  perform_with_relief(place, frame, span);
  // A transfer of nothing (what is whole already) has a span of nothing.
  const bool nothing = span && !here && !span->started();
  if (nothing) span->start(current_stream(device_));
  if (here || nothing) span->stop(current_stream(device_));
  for (const int32_t slot : place.get().frees) frame->drop(slot);
}

void Executor::batch_for(const PlanInstr& instr) {
  const Batch wanted = may_batch_ ? batch_of(instr) : Batch::kNone;
  if (wanted == batch_) return;
  end_batch();
  transport_.set_batch(wanted);
  optimizer_.set_batch(wanted == Batch::kWaits);
  batch_ = wanted;
}

void Executor::end_batch() {
  if (std::exchange(batch_, Batch::kNone) == Batch::kNone) return;
  try {
    optimizer_.set_batch(false);
  } catch (...) {
    transport_.set_batch(Batch::kNone);  // both are as ever for whoever handles the error
    throw;
  }
  transport_.set_batch(Batch::kNone);
}

void Executor::perform_with_relief(const Place& place, Frame* frame,
                                   const std::shared_ptr<Span>& span) {
  HeldInputs held;
  for (int attempt = 0;; ++attempt) {
    std::string why;
    try {
      if (relief_.limited()) check_limit(place, *frame);
      return perform(place, frame, span, &held);
    } catch (const c10::OutOfMemoryError& error) {
      why = error.what_without_backtrace();
    }
    // A region cannot be run again if its inputs are gone, and must not if it
    // draws random numbers or writes to them.
    end_batch();  // relief moves what its instructions use
    const bool again = place.get().op != Op::kRun || !held.inputs || held.kept;
    if (again && replays_.drop()) continue;
    const Needed needed{user_of_states(place), used_params(place), used_slots(place)};
    if (again && relief_.relieve(attempt, frame, needed)) continue;
    throw OutOfMemory("[runtime] rank " + std::to_string(rank_) + ": " + describe(place) +
                      " found no memory on the device, and nothing is left that could go to the "
                      "host: " +
                      why + ". The runtime holds " + std::to_string(relief_.held_bytes(*frame)) +
                      " bytes (" + relief_.held_by_kind(*frame) +
                      "). Use a smaller batch or more ranks, or let the plan keep less "
                      "(compile.memory_budget).");
  }
}

void Executor::check_limit(const Place& place, const Frame& frame) const {
  const int64_t coming = coming_bytes(place, frame);
  const Op op = place.get().op;
  if (coming > 0 || op == Op::kRun || op == Op::kUpdate) relief_.check(frame, coming);
}

void Executor::perform(const Place& place, Frame* frame, const std::shared_ptr<Span>& span,
                       HeldInputs* held) {
  const PlanInstr& instr = place.get();
  ParamState* param = place.param();
  batch_for(instr);
  if (instr.op == Op::kRun) return run_region(place, frame, span, held);
  // Nothing below requires gradients or is a view of what does. Regions may be
  // eager code, which counts its writes by the dispatch that this leaves out.
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  switch (instr.op) {
    case Op::kRun:
      break;
    case Op::kGather:
      return gather(place, frame, span);
    case Op::kWait:
      return store_.wait(*param);
    case Op::kRelease:
      store_.release(*param);
      gathered_.erase(std::remove(gathered_.begin(), gathered_.end(), param), gathered_.end());
      return;
    case Op::kReduce:
      return reduce(place, frame, span);
    case Op::kAccumulate:
      return accumulate(place);
    case Op::kNorm:
      return optimizer_.norm();
    case Op::kUpdate:
      return update(place.part().kind, *param);
    case Op::kDefer:
      return optimizer_.defer(*param);
    case Op::kOffloadStates:
    case Op::kEvictStates:
    case Op::kReloadStates:
    case Op::kAwaitStates:
      return move_states(instr, *param, span);
    case Op::kOffload:
    case Op::kEvict:
    case Op::kReload:
    case Op::kAwait:
      return move_values(instr, frame, span);
  }
  DC_CHECK(false, "the runtime does not know " + describe(place));
}

void Executor::move_states(const PlanInstr& instr, ParamState& param,
                           const std::shared_ptr<Span>& span) {
  if (instr.op == Op::kOffloadStates) return states_.offload(param, span);
  if (instr.op == Op::kEvictStates) return states_.evict(param);
  if (instr.op == Op::kReloadStates) return states_.reload(param, span);
  states_.await(param);
}

void Executor::move_values(const PlanInstr& instr, Frame* frame,
                           const std::shared_ptr<Span>& span) {
  if (instr.op == Op::kOffload) return values_.offload(frame, instr.values, span);
  if (instr.op == Op::kEvict) return values_.evict(frame, instr.values);
  if (instr.op == Op::kReload) return values_.reload(frame, instr.values, span);
  values_.await(frame, instr.values);
}

void Executor::gather(const Place& place, Frame* frame, const std::shared_ptr<Span>& span) {
  ParamState& param = *place.param();
  optimizer_.apply(param);
  const bool starts = param.presence == Presence::kShard;
  if (starts && !param.full.defined()) param.full = replays_.full_buffer(place.instr, param);
  if (const int32_t slot = place.get().rows; slot >= 0) {
    const std::shared_ptr<RowSet> set = rows_at(place, frame);
    at::Tensor numbers;
    if (!set->numbers.defined()) {
      values_.fetch(frame, slot);
      numbers = frame->at(slot).toTensor();
      if (numbers.scalar_type() != at::kLong || numbers.device() != device_) {
        throw UserError("[runtime] " + describe(place) + ": its rows are numbered in " +
                        std::string(c10::toString(numbers.scalar_type())) + " on " +
                        numbers.device().str() + ". Give 64-bit integers on " + device_.str() +
                        ".");
      }
    }
    store_.gather_rows(param, set, numbers, span);
  } else {
    store_.gather(param, span);
  }
  if (starts) gathered_.push_back(&param);
}

// One set a call: its forward's first gather completes it, later gathers and the reduction use it.
std::shared_ptr<RowSet> Executor::rows_at(const Place& place, Frame* frame) const {
  std::shared_ptr<RowSet>& set = frame->rows[place.get().rows];
  if (!set) set = std::make_shared<RowSet>();
  return set;
}

void Executor::update(SectionKind kind, ParamState& param) {
  if (kind == SectionKind::kUpdate) return optimizer_.update(param);
  if (kind == SectionKind::kBackward && last_micro_batch_) return optimizer_.update_early(param);
  optimizer_.apply(param);
}

bool Executor::sums_locally(const Place& place) const {
  return place.loaded->plan.boundary && !last_micro_batch_;
}

void Executor::reduce(const Place& place, Frame* frame, const std::shared_ptr<Span>& span) {
  const PlanInstr& instr = place.get();
  ParamState& param = *place.param();
  optimizer_.apply(param);  // of an earlier step, if its parameter was not used since
  MemberGrads grads;
  for (size_t i = 0; i < instr.values.size(); ++i) {
    values_.fetch(frame, instr.values[i]);
    const RuntimeValue& value = frame->at(instr.values[i]);
    if (value.isTensor() && value.toTensor().defined()) {
      const auto [at, fresh] =
          grads.emplace(static_cast<size_t>(instr.members[i]), value.toTensor());
      // A member used in several regions may have a gradient from each.
      if (!fresh) at->second = at::add(at->second, value.toTensor());
    }
  }
  if (instr.rows >= 0) return store_.reduce_rows(param, rows_at(place, frame), grads, span);
  if (sums_locally(place)) return store_.add_locally(param, grads);
  store_.reduce(param, grads, span);
}

void Executor::accumulate(const Place& place) {
  ParamState& param = *place.param();
  if (sums_locally(place) && !param.pending) return;
  store_.accumulate(param);
}

Executor::Inputs Executor::region_inputs(const Place& place, Frame* frame) {
  const std::vector<LoadedInput>& wanted = place.loaded->inputs[place.section][place.instr];
  // All that can fail first: it can be tried again while the frame is as it was.
  for (const LoadedInput& input : wanted) {
    if (input.param == nullptr) {
      values_.fetch(frame, input.slot);
      continue;
    }
    ParamState& param = *input.param;
    param.bring_full_back();
    if (!param.is_bound() || param.due) {
      throw UserError("[runtime] " + describe(place) + ": parameter " + param.name +
                      (param.due ? " has an update outstanding" : " is not whole") +
                      ". The plan must gather it and wait for it first.");
    }
  }
  Inputs inputs;
  inputs.reserve(wanted.size());
  for (const LoadedInput& input : wanted) {
    if (input.param != nullptr) {
      inputs.emplace_back(input.member->tensor());
    } else if (input.last) {
      inputs.push_back(std::move(frame->at(input.slot)));
    } else {
      inputs.push_back(frame->at(input.slot));
    }
  }
  return inputs;
}

void Executor::run_region(const Place& place, Frame* frame, const std::shared_ptr<Span>& span,
                          HeldInputs* held) {
  const PlanInstr& instr = place.get();
  const PlanRegion& region = place.loaded->plan.regions[static_cast<size_t>(instr.region)];
  if (!held->inputs) {
    held->inputs = region_inputs(place, frame);
    held->kept = relief_.armed() && !region.once;
    // The region holds the last reference to what dies here, and may drop it
    // early; unless it may have to run again.
    for (const int32_t slot : instr.frees) frame->drop(slot);
  }
  Inputs inputs = held->kept ? *held->inputs : std::move(*held->inputs);
  std::vector<RuntimeValue> outputs = run_code(place, span, std::move(inputs));
  if (outputs.size() != region.outputs.size()) {
    throw UserError("[runtime] " + describe(place) + ": its code returned " +
                    std::to_string(outputs.size()) + " values, the plan says " +
                    std::to_string(region.outputs.size()) +
                    ". The code and the plan are of different captures.");
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!frame->moved.empty()) frame->moved.erase(region.outputs[i]);
    frame->at(region.outputs[i]) = std::move(outputs[i]);
  }
}

Executor::Inputs Executor::run_code(const Place& place, const std::shared_ptr<Span>& span,
                                    Inputs inputs) {
  int64_t workspace = -1;
  const auto& wanted = place.loaded->inputs[place.section][place.instr];
  if (auto outputs = replays_.run(place.instr, wanted, &inputs, &workspace)) {
    if (span) span->set_workspace(workspace);
    return std::move(*outputs);
  }
  const auto region = static_cast<size_t>(place.get().region);
  const auto& code = place.loaded->codes[place.loaded->plan.regions[region].code];
  if (span) meter_.begin_run(inputs);
  Inputs outputs = code->run(std::move(inputs));
  if (span) span->set_workspace(meter_.end_run(outputs));
  return outputs;
}

const ParamState* Executor::user_of_states(const Place& place) const {
  const Op op = place.get().op;
  const bool uses = op == Op::kUpdate || op == Op::kReloadStates || op == Op::kAwaitStates;
  return uses || (place.param() != nullptr && place.param()->due) ? place.param() : nullptr;
}

std::set<const ParamState*> Executor::used_params(const Place& place) const {
  const PlanInstr& instr = place.get();
  std::set<const ParamState*> used{place.param()};
  if (instr.region < 0) return used;
  for (const PlanOperand& input :
       place.loaded->plan.regions[static_cast<size_t>(instr.region)].inputs) {
    if (input.is_param) used.insert(place.loaded->params[static_cast<size_t>(input.index)]);
  }
  return used;
}

std::set<int32_t> Executor::used_slots(const Place& place) const {
  const PlanInstr& instr = place.get();
  std::set<int32_t> used(place.part().outputs.begin(), place.part().outputs.end());
  used.insert(instr.values.begin(), instr.values.end());
  if (instr.rows >= 0) used.insert(instr.rows);
  if (instr.region < 0) return used;
  for (const PlanOperand& input :
       place.loaded->plan.regions[static_cast<size_t>(instr.region)].inputs) {
    if (!input.is_param) used.insert(input.index);
  }
  return used;
}

// What the instruction is known to allocate, in bytes. Regions keep that to themselves.
int64_t Executor::coming_bytes(const Place& place, const Frame& frame) const {
  const PlanInstr& instr = place.get();
  ParamState* param = place.param();
  int64_t bytes = 0;
  if (instr.op == Op::kGather && !param->has_full_memory() && param->world > 1) {
    bytes += param->padded_numel() * static_cast<int64_t>(c10::elementSize(param->dtype()));
  }
  const bool updates = instr.op == Op::kUpdate && param->gradient.defined();
  const bool applies = (instr.op == Op::kUpdate || instr.op == Op::kGather) && param->due;
  if (updates || applies || instr.op == Op::kReloadStates) bytes += states_.missing_bytes(*param);
  for (const ParamState* used : used_params(place)) {
    if (used == nullptr || !used->full_is_away()) continue;
    bytes += used->padded_numel() * static_cast<int64_t>(c10::elementSize(used->dtype()));
  }
  if (instr.op == Op::kReload || instr.op == Op::kRun || instr.op == Op::kReduce) {
    for (const int32_t slot : used_slots(place)) bytes += ValueMover::missing_bytes(frame, slot);
  }
  return bytes;
}

std::string Executor::describe(const Place& place) const {
  const Plan& plan = place.loaded->plan;
  const PlanSection& section = place.part();
  std::string text(to_string(section.kind));
  if (section.kind != SectionKind::kUpdate) text.append(" ").append(std::to_string(section.graph));
  if (place.instr >= section.instrs.size()) return text.append(", its outputs");
  const PlanInstr& instr = place.get();
  text.append(", instruction ").append(std::to_string(place.instr));
  text.append(" (").append(traits(instr.op).name);
  if (instr.param >= 0) text.append(" ").append(plan.params[static_cast<size_t>(instr.param)]);
  if (instr.region >= 0) {
    text.append(" ").append(plan.regions[static_cast<size_t>(instr.region)].name);
  }
  for (size_t i = 0; i < instr.values.size() && instr.op != Op::kReduce; ++i) {
    text.append(i == 0 ? " " : ", ").append(plan.values[static_cast<size_t>(instr.values[i])]);
  }
  return text.append(")");
}

}  // namespace deepcompile
