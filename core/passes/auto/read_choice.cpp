// SPDX-License-Identifier: Apache-2.0
#include "passes/auto/read_choice.h"

#include <algorithm>
#include <optional>
#include <set>
#include <tuple>
#include <utility>
#include <variant>

#include "analysis/footprint.h"
#include "base/lists.h"

namespace deepcompile {
namespace {

bool reads(const StepProgram& program, const Instr& run, ParamId id) {
  const auto& inputs = program.region(*run.region).inputs;
  return std::any_of(inputs.begin(), inputs.end(), [&](const Operand& operand) {
    const auto* ref = std::get_if<ParamRef>(&operand);
    return ref != nullptr && ref->param == id;
  });
}

// Runs from position `at` to the first that reads the parameter; none if no
// run does.
std::optional<int> runs_until_use(const StepProgram& program, const Section& section, size_t at,
                                  ParamId id) {
  int runs = 0;
  for (size_t i = at; i < section.instrs.size(); ++i) {
    if (section.instrs[i].op != Op::kRun) continue;
    if (reads(program, section.instrs[i], id)) return runs;
    ++runs;
  }
  return std::nullopt;
}

void read_sets(const StepProgram& plan, AutoChoice* choice) {
  std::vector<bool> forward(plan.regions.size(), false);
  for (const Section& section : plan.sections) {
    for (const Instr& instr : section.instrs) {
      if (instr.op == Op::kRun) {
        if (section.kind == SectionKind::kForward) forward[index(*instr.region)] = true;
        const bool again = section.kind == SectionKind::kBackward && forward[index(*instr.region)];
        if (again) choice->recompute.push_back(*instr.region);
      } else if (instr.op == Op::kEvict) {
        auto& values = choice->offload_values;
        values.insert(values.end(), instr.values.begin(), instr.values.end());
      } else if (instr.op == Op::kEvictStates) {
        choice->offload_states.push_back(*instr.param);
      }
    }
  }
  sort_unique(&choice->recompute);
  sort_unique(&choice->offload_values);
  sort_unique(&choice->offload_states);
}

void read_place(const StepProgram& plan, AutoChoice* choice) {
  int ahead = 0;
  for (const Section& section : plan.sections) {
    for (size_t i = 0; i < section.instrs.size(); ++i) {
      if (section.instrs[i].op != Op::kUpdate) continue;
      if (section.kind == SectionKind::kBackward) choice->place = Place::kBackward;
      if (section.kind != SectionKind::kForward) continue;
      choice->place = Place::kNextForward;
      const auto runs = runs_until_use(plan, section, i, *section.instrs[i].param);
      ahead = std::max(ahead, runs.value_or(0));
    }
  }
  if (choice->place == Place::kNextForward) choice->ahead = ahead;
}

// A release by what stays the same when others go: its parameter, its section
// and the run before it.
using ReleaseKey = std::tuple<ParamId, size_t, uint32_t>;

// By instruction: the region of the last run before it.
std::vector<uint32_t> runs_before(const Section& section) {
  std::vector<uint32_t> out;
  uint32_t run = UINT32_MAX;
  for (const Instr& instr : section.instrs) {
    out.push_back(run);
    if (instr.op == Op::kRun) run = static_cast<uint32_t>(index(*instr.region));
  }
  return out;
}

std::set<ReleaseKey> releases(const StepProgram& program) {
  std::set<ReleaseKey> out;
  for (size_t s = 0; s < program.sections.size(); ++s) {
    const std::vector<Instr>& instrs = program.sections[s].instrs;
    const std::vector<uint32_t> run = runs_before(program.sections[s]);
    for (size_t i = 0; i < instrs.size(); ++i) {
      if (instrs[i].op == Op::kRelease) out.emplace(*instrs[i].param, s, run[i]);
    }
  }
  return out;
}

void read_gaps(AutoBuilder& builder, const StepProgram& plan, AutoChoice* choice) {
  const std::set<ReleaseKey> there = releases(plan);
  const std::vector<Gap> gaps = builder.gaps(*choice);
  std::vector<std::vector<uint32_t>> last_run;  // by section and instruction
  for (const Section& section : builder.last().sections) last_run.push_back(runs_before(section));
  for (const Gap& gap : gaps) {
    const uint32_t run = last_run[gap.release.section][gap.release.instr];
    if (!there.contains({gap.id.param, gap.release.section, run})) {
      choice->keep->push_back(gap.id);
    }
  }
  std::sort(choice->keep->begin(), choice->keep->end());
}

// The most bytes that are gathered and not yet where their first use wants them.
Bytes ahead_of_use(const StepProgram& plan, const Section& section) {
  struct Waiting {
    int run;  // that uses it
    Bytes bytes;
  };
  std::vector<Waiting> waiting;
  Bytes most{-1};
  int now = 0;
  for (size_t i = 0; i < section.instrs.size(); ++i) {
    const Instr& instr = section.instrs[i];
    if (instr.op == Op::kRun) ++now;
    if (instr.op != Op::kGather) continue;
    const auto runs = runs_until_use(plan, section, i, *instr.param);
    if (!runs || *runs == 0) continue;
    std::erase_if(waiting, [&](const Waiting& each) { return each.run <= now; });
    waiting.push_back({now + *runs, footprint(plan, *instr.param).gathered});
    Bytes sum;
    for (const Waiting& each : waiting) sum += each.bytes;
    most = std::max(most, sum);
  }
  return most;
}

}  // namespace

AutoChoice read_choice(AutoBuilder& builder, const StepProgram& plan) {
  AutoChoice choice;
  read_sets(plan, &choice);
  read_place(plan, &choice);
  for (const Section& section : plan.sections) {
    choice.limits.push_back(ahead_of_use(plan, section));
  }
  for (const Reason& reason : plan.reasons) {
    if (reason.pass == "auto" && reason.object.empty()) read_levels(reason.text, &choice);
  }
  // Of a plan that was edited by hand.
  if (choice.limits.size() != plan.sections.size()) choice.limits.clear();
  read_gaps(builder, plan, &choice);
  return choice;
}

}  // namespace deepcompile
