// SPDX-License-Identifier: Apache-2.0
#include "passes/zero1_compile.h"

#include <string>
#include <utility>

#include "base/error.h"
#include "passes/placement.h"

namespace deepcompile {
namespace {

void check_whole(const StepProgram& program) {
  for (const Param& param : program.params) {
    if (param.placement == Placement::kWhole) continue;
    const bool sharded = param.placement == Placement::kSharded;
    throw UserError("[passes] zero1_compile: parameter " + param.name + " is placed " +
                    std::string(to_string(param.placement)) +
                    ", and stages 1 and 2 keep every parameter whole. " +
                    (sharded ? "Use stage 3 (zero3_compile)" : "Use stage 0 (zero0_compile)") +
                    ", or place it `whole`.");
  }
}

// Each update's gather right behind it; the waits once all are on their way.
std::vector<Instr> place_updates_and_gathers(const StepProgram& program) {
  std::vector<Instr> out, waits;
  for (Instr& instr : place_updates(program)) {
    const std::optional<ParamId> param = instr.param;
    out.push_back(std::move(instr));
    if (!param) continue;  // the norm
    out.push_back({Op::kGather, param, std::nullopt, {}});
    waits.push_back({Op::kWait, param, std::nullopt, {}});
  }
  out.insert(out.end(), waits.begin(), waits.end());
  return out;
}

void explain(const StepProgram& program, size_t reductions, bool updates, PassContext& context) {
  for (size_t i = 0; updates && i < program.params.size(); ++i) {
    const ParamId id{static_cast<uint32_t>(i)};
    if (!program.param(id).trainable) continue;
    context.because(id, "kept whole: " + pretty(program.full_bytes(id)) +
                            " a rank, gathered once a step, after its update; optimizer states "
                            "sharded over " +
                            std::to_string(program.world) + " ranks");
  }
  if (reductions == 0) return;
  const bool late = program.boundary && program.accumulation > 1;
  context.because(std::to_string(reductions) + " reductions " +
                  (late ? "in the last micro batch alone (stage 1): the others add up whole "
                          "gradients on their rank"
                        : "a micro batch") +
                  ", no gathers in forward and backward");
}

}  // namespace

Contract Zero1Compile::contract() const {
  return {.needs = {},
          .provides = {Fact::kReductionsPlaced, Fact::kUpdatesPlaced},
          .conflicts = {Fact::kGathersPlaced, Fact::kReductionsPlaced, Fact::kUpdatesPlaced}};
}

void Zero1Compile::run(StepProgram& program, PassContext& context) const {
  check_compute_only(program, name());
  check_whole(program);
  size_t reductions = 0;
  bool updates = false;
  for (Section& section : program.sections) {
    if (section.kind == SectionKind::kUpdate) {
      section.instrs = place_updates_and_gathers(program);
      updates = true;
    } else if (section.kind == SectionKind::kBackward) {
      reductions += place_reductions(program, &section);
    }
  }
  explain(program, reductions, updates, context);
}

}  // namespace deepcompile
