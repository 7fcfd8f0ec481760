// SPDX-License-Identifier: Apache-2.0
#include "passes/auto/held_plan.h"

#include <algorithm>

#include "base/error.h"
#include "ir/transplant.h"
#include "ir/verifier.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

bool updates_early(const StepProgram& plan) {
  return std::any_of(plan.sections.begin(), plan.sections.end(), [](const Section& section) {
    return section.kind == SectionKind::kBackward &&
           std::any_of(section.instrs.begin(), section.instrs.end(),
                       [](const Instr& instr) { return instr.op == Op::kUpdate; });
  });
}

}  // namespace

std::optional<StepProgram> held_plan(const AutoBuilder& builder, const StepProgram& plain) {
  const StepProgram* held = builder.environment().held;
  if (held == nullptr) return std::nullopt;
  try {
    if (structure(*held) != structure(plain)) return std::nullopt;
    StepProgram out = transplant(*held, plain);
    if (out.params.size() != plain.params.size()) return std::nullopt;
    verify_plan(out);
    out.reasons = held->reasons;
    if (updates_early(out) && !builder.early_updates()) return std::nullopt;
    return out;
  } catch (const UserError&) {
    return std::nullopt;
  }
}

void stay_with(const StepProgram& held, PassContext& context, StepProgram* program) {
  replace_instrs(instrs_of(held), program);
  context.because("the plan that holds stays: none that was found is better");
  if (!context.environment().reasons) return;
  for (const Reason& reason : held.reasons) {
    const bool old = reason.pass == context.pass() &&
                     (reason.text.starts_with("step ") || reason.text.starts_with("the plan that"));
    if (!old) program->reasons.push_back(reason);
  }
}

}  // namespace deepcompile
