// SPDX-License-Identifier: Apache-2.0
#include "runtime/exec/loaded_plan.h"

#include <algorithm>
#include <set>

#include "base/error.h"

namespace deepcompile {
namespace {

[[noreturn]] void refuse(const Plan& plan, const std::string& why) {
  throw UserError("[runtime] plan " + plan.name + " (" + plan.hash + "): " + why);
}

void check_limits(const Plan& plan, const PlanLimits& limits) {
  if (plan.world != limits.world) {
    refuse(plan, "it was made for " + std::to_string(plan.world) + " ranks, this job has " +
                     std::to_string(limits.world) + ". Plan again with the job's ranks.");
  }
  if (plan.accumulation != limits.accumulation) {
    refuse(plan, "it accumulates " + std::to_string(plan.accumulation) +
                     " gradients a step, this job " + std::to_string(limits.accumulation) +
                     ". Plan again with the job's gradient_accumulation_steps.");
  }
  if (scalar_type(plan.reduce_dtype) != limits.reduce_dtype) {
    refuse(plan, "it reduces in " + std::string(to_string(plan.reduce_dtype)) +
                     ", this job in another type. Plan again with the job's reduce dtype.");
  }
}

void check_member(const LoadedPlan& loaded, int32_t param, int32_t member) {
  const ParamState& state = *loaded.params.at(static_cast<size_t>(param));
  if (member < 0 || static_cast<size_t>(member) >= state.members.size()) {
    refuse(loaded.plan, "parameter " + state.name + " has no member " + std::to_string(member) +
                            ". The plan belongs to another model.");
  }
}

bool needs_trainable(Op op) {
  switch (op) {
    case Op::kReduce:
    case Op::kAccumulate:
    case Op::kUpdate:
    case Op::kDefer:
    case Op::kOffloadStates:
    case Op::kEvictStates:
    case Op::kReloadStates:
    case Op::kAwaitStates:
      return true;
    default:
      return false;
  }
}

void check_objects(const LoadedPlan& loaded) {
  for (const PlanRegion& region : loaded.plan.regions) {
    if (region.code >= loaded.codes.size() || loaded.codes[region.code] == nullptr) {
      refuse(loaded.plan, "region " + region.name + " needs code " + std::to_string(region.code) +
                              " of " + std::to_string(loaded.codes.size()) +
                              ". Pass the code list of "
                              "the capture the plan was made from.");
    }
    for (const PlanOperand& input : region.inputs) {
      if (input.is_param) check_member(loaded, input.index, input.member);
    }
  }
  for (const PlanSection& section : loaded.plan.sections) {
    for (const PlanInstr& instr : section.instrs) {
      for (const int32_t member : instr.members) check_member(loaded, instr.param, member);
      if (!needs_trainable(instr.op)) continue;
      const ParamState& param = *loaded.params.at(static_cast<size_t>(instr.param));
      if (!param.trainable) {
        refuse(loaded.plan, std::string(traits(instr.op).name) + " " + param.name +
                                ": the parameter is frozen in this job. Plan again.");
      }
    }
  }
}

void check_rows(const LoadedPlan& loaded, ParamStore& store) {
  for (const PlanSection& section : loaded.plan.sections) {
    for (const PlanInstr& instr : section.instrs) {
      if (instr.rows < 0) continue;
      const ParamState& param = *loaded.params.at(static_cast<size_t>(instr.param));
      const bool fits = param.placement == Placement::kSharded && param.members.size() == 1 &&
                        param.members[0].slot.tensor().dim() == 2 && !loaded.plan.boundary;
      if (!fits) {
        refuse(loaded.plan, "parameter " + param.name +
                                " is exchanged by rows, and is not one sharded matrix whose "
                                "gradient is reduced in each micro batch. Plan again.");
      }
      if (param.world == 1 || !store.rows().has_host_side()) {
        refuse(loaded.plan, "parameter " + param.name +
                                " is exchanged by rows, and the ranks cannot exchange how many. "
                                "Call exchange_rows_over first, with several ranks.");
      }
    }
  }
}

// Value slots that the backward of `graph` reads before it makes them itself.
std::vector<int32_t> read_by_backward(const Plan& plan, uint32_t graph) {
  std::set<int32_t> read;
  for (const PlanSection& section : plan.sections) {
    if (section.kind != SectionKind::kBackward || section.graph != graph) continue;
    std::set<int32_t> made(section.inputs.begin(), section.inputs.end());
    const auto use = [&](int32_t value) {
      if (made.count(value) == 0) read.insert(value);
    };
    for (const PlanInstr& instr : section.instrs) {
      for (const int32_t value : instr.values) use(value);
      if (instr.region < 0) continue;
      const PlanRegion& region = plan.regions.at(static_cast<size_t>(instr.region));
      for (const PlanOperand& input : region.inputs) {
        if (!input.is_param) use(input.index);
      }
      made.insert(region.outputs.begin(), region.outputs.end());
    }
    for (const int32_t value : section.outputs) use(value);
  }
  return {read.begin(), read.end()};
}

std::vector<LoadedInput> resolve_inputs(const LoadedPlan& loaded, const PlanInstr& instr) {
  std::vector<LoadedInput> inputs;
  if (instr.op != Op::kRun) return inputs;
  const PlanRegion& region = loaded.plan.regions.at(static_cast<size_t>(instr.region));
  for (const PlanOperand& operand : region.inputs) {
    if (!operand.is_param) {
      inputs.push_back({.slot = operand.index});
      continue;
    }
    ParamState* param = loaded.params.at(static_cast<size_t>(operand.index));
    const Member& member = param->members.at(static_cast<size_t>(operand.member));
    inputs.push_back({.param = param, .member = &member.slot});
  }
  std::set<int32_t> dying(instr.frees.begin(), instr.frees.end());
  for (auto input = inputs.rbegin(); input != inputs.rend(); ++input) {
    if (input->param == nullptr) input->last = dying.erase(input->slot) != 0;
  }
  return inputs;
}

}  // namespace

c10::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return c10::kFloat;
    case DType::kF16:
      return c10::kHalf;
    case DType::kBF16:
      return c10::kBFloat16;
    case DType::kF64:
      return c10::kDouble;
  }
  DC_CHECK(false, "a DType has one of four values");
}

LoadedPlan load_plan(std::string_view text, std::vector<std::shared_ptr<RegionCode>> codes,
                     ParamStore& store, const PlanLimits& limits) {
  LoadedPlan loaded;
  loaded.plan = parse_plan(text);  // checks indices and the hash
  loaded.codes = std::move(codes);
  check_limits(loaded.plan, limits);
  for (const std::string& name : loaded.plan.params) {
    ParamState* param = store.find(name);
    if (param == nullptr) {
      refuse(loaded.plan,
             "this model has no parameter " + name + ". The plan belongs to another model.");
    }
    loaded.params.push_back(param);
  }
  check_objects(loaded);
  check_rows(loaded, store);
  for (const PlanSection& section : loaded.plan.sections) {
    loaded.kept.push_back(section.kind == SectionKind::kForward
                              ? read_by_backward(loaded.plan, section.graph)
                              : std::vector<int32_t>{});
    auto& inputs = loaded.inputs.emplace_back();
    for (const PlanInstr& instr : section.instrs) inputs.push_back(resolve_inputs(loaded, instr));
  }
  return loaded;
}

}  // namespace deepcompile
