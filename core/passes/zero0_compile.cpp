// SPDX-License-Identifier: Apache-2.0
#include "passes/zero0_compile.h"

#include <string>

#include "base/error.h"
#include "passes/placement.h"

namespace deepcompile {

Contract Zero0Compile::contract() const {
  return {.needs = {},
          .provides = {Fact::kReductionsPlaced, Fact::kUpdatesPlaced},
          .conflicts = {Fact::kGathersPlaced, Fact::kReductionsPlaced, Fact::kUpdatesPlaced}};
}

void Zero0Compile::run(StepProgram& program, PassContext& context) const {
  check_compute_only(program, name());
  for (const Param& param : program.params) {
    if (param.placement == Placement::kReplicated) continue;
    throw UserError("[passes] zero0_compile: parameter " + param.name + " is placed " +
                    std::string(to_string(param.placement)) +
                    ", and stage 0 keeps every parameter replicated. Place it `replicated`, or "
                    "use zero3_compile.");
  }
  size_t reductions = 0;
  for (Section& section : program.sections) {
    if (section.kind == SectionKind::kUpdate) section.instrs = place_updates(program);
    if (section.kind != SectionKind::kBackward) continue;
    reductions += place_reductions(program, &section);
  }
  if (reductions > 0) {
    context.because("every parameter is on every rank: no gathers, " + std::to_string(reductions) +
                    " reductions a micro batch");
  }
}

}  // namespace deepcompile
