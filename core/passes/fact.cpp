// SPDX-License-Identifier: Apache-2.0
#include "passes/fact.h"

#include <algorithm>

#include "base/error.h"

namespace deepcompile {

std::string_view to_string(Fact fact) {
  switch (fact) {
    case Fact::kGathersPlaced:
      return "gathers_placed";
    case Fact::kReductionsPlaced:
      return "reductions_placed";
    case Fact::kUpdatesPlaced:
      return "updates_placed";
    case Fact::kRegionsTimed:
      return "regions_timed";
  }
  DC_CHECK(false, "unknown fact");
}

std::optional<Fact> parse_fact(std::string_view word) {
  for (int i = 0; i < kFactCount; ++i) {
    if (to_string(static_cast<Fact>(i)) == word) return static_cast<Fact>(i);
  }
  return std::nullopt;
}

std::set<Fact> facts_of(const StepProgram& program) {
  std::set<Fact> facts;
  for (const Section& section : program.sections) {
    for (const Instr& instr : section.instrs) {
      // Updates also gather; those gathers belong to kUpdatesPlaced.
      if (instr.op == Op::kGather && section.kind != SectionKind::kUpdate) {
        facts.insert(Fact::kGathersPlaced);
      }
      if (instr.op == Op::kReduce) facts.insert(Fact::kReductionsPlaced);
      if (instr.op == Op::kUpdate) facts.insert(Fact::kUpdatesPlaced);
    }
  }
  const bool timed = std::all_of(program.regions.begin(), program.regions.end(),
                                 [](const Region& each) { return each.time.has_value(); });
  if (timed && !program.regions.empty()) facts.insert(Fact::kRegionsTimed);
  return facts;
}

}  // namespace deepcompile
