// SPDX-License-Identifier: Apache-2.0
#include "passes/held_plan.h"

#include "base/error.h"
#include "ir/transplant.h"
#include "ir/verifier.h"
#include "passes/read_choice.h"

namespace deepcompile {

std::optional<StepProgram> held_plan(AutoBuilder& builder, const StepProgram& plain) {
  const StepProgram* held = builder.environment().held;
  if (held == nullptr) return std::nullopt;
  try {
    if (structure(*held) != structure(plain)) return std::nullopt;
    StepProgram out = transplant(*held, plain);
    if (out.params.size() != plain.params.size()) return std::nullopt;
    verify_plan(out);
    out.reasons = held->reasons;
    const bool early = read_choice(builder, out).place == Place::kBackward;
    if (early && !builder.early_updates()) return std::nullopt;
    return out;
  } catch (const UserError&) {
    return std::nullopt;
  }
}

void stay_with(const StepProgram& held, PassContext& context, StepProgram* program) {
  for (size_t s = 0; s < held.sections.size(); ++s) {
    program->sections[s].instrs = held.sections[s].instrs;
  }
  context.because("the plan that holds stays: none that was found is better");
  if (!context.environment().reasons) return;
  for (const Reason& reason : held.reasons) {
    const bool old = reason.pass == context.pass() &&
                     (reason.text.starts_with("step ") || reason.text.starts_with("the plan that"));
    if (!old) program->reasons.push_back(reason);
  }
}

}  // namespace deepcompile
