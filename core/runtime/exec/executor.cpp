// SPDX-License-Identifier: Apache-2.0
#include "runtime/exec/executor.h"

#include <ATen/ops/add.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "base/error.h"

namespace deepcompile {
namespace {

std::optional<c10::Stream> current_stream(c10::Device device) {
  if (device.is_cpu()) return std::nullopt;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

// Transfers time themselves, from start to end on the link. A gather of what is
// whole already is none.
bool starts_transfer(Op op, const ParamState* param) {
  return op == Op::kReduce || (op == Op::kGather && param->presence == Presence::kShard);
}

}  // namespace

Executor::Executor(ParamStore& store, ShardedAdam& optimizer, Tracer& tracer, int64_t rank,
                   c10::Device device)
    : store_(store), optimizer_(optimizer), tracer_(tracer), rank_(rank), device_(device) {}

void Executor::run(const LoadedPlan& loaded, size_t section, std::vector<RuntimeValue>* values) {
  Place place{&loaded, section, 0};
  gathered_.clear();
  try {
    const size_t count = loaded.plan.sections[section].instrs.size();
    for (; place.instr < count; ++place.instr) step(place, values);
  } catch (const TransportError& error) {
    const std::string text = "[runtime] rank " + std::to_string(rank_) + ": " + describe(place) +
                             " failed: " + error.what() +
                             ". A peer stopped or is far behind: see its output; raise the "
                             "timeout if it is only slow.";
    recover(/*reachable=*/false);
    throw UserError(text);
  } catch (...) {
    recover(/*reachable=*/true);
    throw;
  }
}

void Executor::recover(bool reachable) {
  store_.abandon_transfers(reachable);
  for (ParamState* param : gathered_) {
    if (param->full.defined() && param->placement == Placement::kSharded) param->drop_full();
  }
  gathered_.clear();
}

void Executor::step(const Place& place, std::vector<RuntimeValue>* values) {
  const PlanInstr& instr = place.get();
  ParamState* param =
      instr.param < 0 ? nullptr : place.loaded->params[static_cast<size_t>(instr.param)];
  const std::shared_ptr<Span> span = tracer_.open(
      {place.loaded->id, static_cast<int64_t>(place.section), static_cast<int64_t>(place.instr)});
  const bool here = span && !starts_transfer(instr.op, param);
  if (here) span->start(current_stream(device_));
  switch (instr.op) {
    case Op::kGather:
      if (param->presence == Presence::kShard) gathered_.push_back(param);
      store_.gather(*param, span);
      break;
    case Op::kWait:
      store_.wait(*param);
      break;
    case Op::kRelease:
      store_.release(*param);
      gathered_.erase(std::remove(gathered_.begin(), gathered_.end(), param), gathered_.end());
      break;
    case Op::kRun:
      run_region(place, values);
      break;
    case Op::kReduce:
      reduce(place, *values, span);
      break;
    case Op::kAccumulate:
      store_.accumulate(*param);
      break;
    case Op::kNorm:
      optimizer_.norm();
      break;
    case Op::kUpdate:
      optimizer_.update(*param);
      break;
    default:
      DC_CHECK(false, "the runtime does not know " + describe(place));
  }
  if (here) span->stop(current_stream(device_));
  for (const int32_t slot : instr.frees) (*values)[static_cast<size_t>(slot)] = RuntimeValue();
}

void Executor::run_region(const Place& place, std::vector<RuntimeValue>* values) {
  const PlanInstr& instr = place.get();
  const PlanRegion& region = place.loaded->plan.regions[static_cast<size_t>(instr.region)];
  std::vector<RuntimeValue> inputs;
  inputs.reserve(region.inputs.size());
  for (const PlanOperand& input : region.inputs) {
    if (!input.is_param) {
      inputs.push_back((*values)[static_cast<size_t>(input.index)]);
      continue;
    }
    const ParamState& param = *place.loaded->params[static_cast<size_t>(input.index)];
    if (param.presence != Presence::kWhole) {
      throw UserError("[runtime] " + describe(place) + ": parameter " + param.name +
                      " is not whole. The plan must gather it and wait for it first.");
    }
    inputs.push_back(param.members[static_cast<size_t>(input.member)].slot.tensor());
  }
  // The region holds the last reference to what dies here, and may drop it early.
  for (const int32_t slot : instr.frees) (*values)[static_cast<size_t>(slot)] = RuntimeValue();
  const auto& code = place.loaded->codes[region.code];
  std::vector<RuntimeValue> outputs = code->run(std::move(inputs));
  if (outputs.size() != region.outputs.size()) {
    throw UserError("[runtime] " + describe(place) + ": its code returned " +
                    std::to_string(outputs.size()) + " values, the plan says " +
                    std::to_string(region.outputs.size()) +
                    ". The code and the plan are of different captures.");
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    (*values)[static_cast<size_t>(region.outputs[i])] = std::move(outputs[i]);
  }
}

void Executor::reduce(const Place& place, const std::vector<RuntimeValue>& values,
                      std::shared_ptr<Span> span) {
  const PlanInstr& instr = place.get();
  MemberGrads grads;
  for (size_t i = 0; i < instr.values.size(); ++i) {
    const RuntimeValue& value = values[static_cast<size_t>(instr.values[i])];
    if (value.isTensor() && value.toTensor().defined()) {
      const auto [at, fresh] =
          grads.emplace(static_cast<size_t>(instr.members[i]), value.toTensor());
      // A member used in several regions may have a gradient from each.
      if (!fresh) at->second = at::add(at->second, value.toTensor());
    }
  }
  store_.reduce(*place.loaded->params[static_cast<size_t>(instr.param)], grads, std::move(span));
}

std::string Executor::describe(const Place& place) const {
  const PlanInstr& instr = place.get();
  const Plan& plan = place.loaded->plan;
  const PlanSection& section = plan.sections[place.section];
  std::string text(to_string(section.kind));
  if (section.kind != SectionKind::kUpdate) text.append(" ").append(std::to_string(section.graph));
  text.append(", instruction ").append(std::to_string(place.instr));
  text.append(" (").append(traits(instr.op).name);
  if (instr.param >= 0) text.append(" ").append(plan.params[static_cast<size_t>(instr.param)]);
  if (instr.region >= 0) {
    text.append(" ").append(plan.regions[static_cast<size_t>(instr.region)].name);
  }
  return text.append(")");
}

}  // namespace deepcompile
