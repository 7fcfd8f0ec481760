// SPDX-License-Identifier: Apache-2.0
#include <span>

#include "analysis/liveness.h"
#include "base/error.h"
#include "ir/verifier.h"
#include "plan/plan.h"

namespace deepcompile {
namespace {

template <typename Id>
int32_t slot(Id id) {
  return static_cast<int32_t>(index(id));
}

std::vector<int32_t> slots(std::span<const ValueId> ids) {
  std::vector<int32_t> result;
  result.reserve(ids.size());
  for (ValueId id : ids) result.push_back(slot(id));
  return result;
}

PlanRegion freeze_region(const Region& region) {
  PlanRegion frozen{region.name, region.code, region.once, {}, slots(region.outputs)};
  for (const Operand& operand : region.inputs) {
    if (const auto* ref = std::get_if<ParamRef>(&operand)) {
      frozen.inputs.push_back({true, slot(ref->param), static_cast<int32_t>(ref->member)});
    } else {
      frozen.inputs.push_back({false, slot(std::get<ValueId>(operand)), 0});
    }
  }
  return frozen;
}

PlanInstr freeze_instr(const StepProgram& program, const Section& section, const Instr& instr) {
  PlanInstr frozen;
  frozen.op = instr.op;
  if (instr.param) frozen.param = slot(*instr.param);
  if (instr.region) frozen.region = slot(*instr.region);
  for (ValueId id : instr.values) {
    frozen.values.push_back(slot(id));
    if (instr.op != Op::kReduce) continue;
    const auto& grad_of = program.value(id).grad_of;
    DC_CHECK(grad_of.has_value(), "verified programs reduce gradients only");
    frozen.members.push_back(static_cast<int32_t>(grad_of->member));
  }
  if (instr.op == Op::kGather || instr.op == Op::kReduce) {
    if (const auto ids = program.rows_input(section, *instr.param)) frozen.rows = slot(*ids);
  }
  return frozen;
}

PlanSection freeze_section(const StepProgram& program, const Section& section,
                           const SectionLiveness& liveness) {
  PlanSection frozen{
      section.kind, section.graph, slots(section.inputs), slots(section.outputs), {}};
  for (size_t i = 0; i < section.instrs.size(); ++i) {
    PlanInstr instr = freeze_instr(program, section, section.instrs[i]);
    instr.frees = slots(liveness.frees[i]);
    frozen.instrs.push_back(std::move(instr));
  }
  return frozen;
}

}  // namespace

Plan freeze(const StepProgram& program) {
  verify_plan(program);
  const Liveness liveness = analyze_liveness(program);
  Plan plan;
  plan.name = program.name;
  plan.world = program.world;
  plan.accumulation = program.accumulation;
  plan.clip = program.clip;
  plan.boundary = program.boundary;
  plan.reduce_dtype = program.reduce_dtype;
  for (const Param& param : program.params) plan.params.push_back(param.name);
  for (const Value& value : program.values) plan.values.push_back(value.name);
  for (const Region& region : program.regions) plan.regions.push_back(freeze_region(region));
  for (size_t s = 0; s < program.sections.size(); ++s) {
    plan.sections.push_back(freeze_section(program, program.sections[s], liveness.sections[s]));
  }
  plan.hash = content_hash(plan);
  return plan;
}

}  // namespace deepcompile
