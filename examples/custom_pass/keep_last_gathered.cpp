// SPDX-License-Identifier: Apache-2.0
// keep_last_gathered: a pass of our own, in C++.
//
// The backward begins with the parameters that the forward used last. zero3_compile releases each
// at the end of the forward and gathers it again a moment later. This pass takes such releases
// out, from the end of the forward backwards, for as long as the step stays within the memory
// budget and simulates faster: the gather of what is whole costs nothing.
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/error.h"
#include "ir/verifier.h"
#include "sim/export_pass.h"

namespace {

using namespace deepcompile;

std::optional<size_t> section_of(const StepProgram& program, SectionKind kind, uint32_t graph) {
  for (size_t i = 0; i < program.sections.size(); ++i) {
    if (program.sections[i].kind == kind && program.sections[i].graph == graph) return i;
  }
  return std::nullopt;
}

// Sharded parameters in the order in which a forward releases them, the last first.
std::vector<ParamId> last_released(const StepProgram& program, const Section& forward) {
  std::vector<ParamId> params;
  std::set<ParamId> seen;
  for (auto instr = forward.instrs.rbegin(); instr != forward.instrs.rend(); ++instr) {
    if (instr->op != Op::kRelease || !seen.insert(*instr->param).second) continue;
    if (program.param(*instr->param).placement == Placement::kSharded) {
      params.push_back(*instr->param);
    }
  }
  return params;
}

// Without the last release of `param` in the forward. Its gather in the backward then finds it
// whole and costs nothing.
StepProgram kept(const StepProgram& program, size_t forward, ParamId param) {
  StepProgram result = program;
  std::vector<Instr>& instrs = result.sections[forward].instrs;
  for (size_t i = instrs.size(); i-- > 0;) {
    if (instrs[i].op == Op::kRelease && instrs[i].param == param) {
      instrs.erase(instrs.begin() + static_cast<std::ptrdiff_t>(i));
      break;
    }
  }
  return result;
}

class KeepLastGathered final : public Pass {
 public:
  std::string_view name() const override { return "keep_last_gathered"; }
  std::string_view summary() const override { return "keeps whole what the backward uses first"; }
  Contract contract() const override {
    return {.needs = {Fact::kGathersPlaced, Fact::kReductionsPlaced}};
  }

  void run(StepProgram& program, PassContext& context) const override {
    const PassEnvironment& environment = context.environment();
    if (environment.simulator == nullptr) {
      throw UserError("it asks what a step takes: give the machine that is planned for");
    }
    for (size_t s = 0; s < program.sections.size(); ++s) {
      const Section& section = program.sections[s];
      if (section.kind != SectionKind::kForward) continue;
      if (section_of(program, SectionKind::kBackward, section.graph)) keep(program, s, context);
    }
  }

 private:
  static void keep(StepProgram& program, size_t forward, PassContext& context) {
    const PassEnvironment& environment = context.environment();
    SimSummary now = environment.simulate(program);
    for (ParamId param : last_released(program, program.sections[forward])) {
      StepProgram next = kept(program, forward, param);
      const SimSummary then = environment.simulate(next);
      const bool fits = !environment.memory_budget || then.peak <= *environment.memory_budget;
      if (!fits || then.time >= now.time) return;
      program = std::move(next);
      context.because(param, "kept whole into the backward: saves " + pretty(now.time - then.time) +
                                 " a step for " + pretty(program.full_bytes(param)));
      now = then;
    }
  }
};

}  // namespace

DEEPCOMPILE_PASS(KeepLastGathered);
