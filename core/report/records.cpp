// SPDX-License-Identifier: Apache-2.0
#include "report/records.h"

#include <algorithm>

#include "base/error.h"
#include "ir/text.h"

namespace deepcompile {

RecordNames::RecordNames(const PlanPrograms& plans) {
  uint32_t graph = 0;
  for (const auto& [id, program] : plans) {
    Plan plan{id, program, {}};
    bool is_graph = false;
    for (const Section& section : program->sections) {
      Section named{section.kind, 0, {}, {}, {}};
      if (section.kind != SectionKind::kUpdate) {
        named.graph = graph;
        is_graph = true;
      }
      plan.sections.push_back(section_name(named));
    }
    if (is_graph) ++graph;
    plans_.push_back(std::move(plan));
  }
}

RecordNames::Entry RecordNames::find(const Record& record) const {
  const auto plan = std::find_if(plans_.begin(), plans_.end(),
                                 [&](const Plan& each) { return each.id == record.plan; });
  if (plan == plans_.end()) {
    throw UserError("[report] record of plan " + std::to_string(record.plan) +
                    ": no program was given for it. Give the program of every loaded plan.");
  }
  const auto& sections = plan->program->sections;
  if (record.section >= sections.size() || record.instr >= sections[record.section].instrs.size()) {
    throw UserError(
        "[report] record of plan " + std::to_string(record.plan) + ", section " +
        std::to_string(record.section) + ", instruction " + std::to_string(record.instr) +
        ": the program has none there. Give the program that the plan was frozen from.");
  }
  return {plan->program, &sections[record.section].instrs[record.instr],
          plan->sections[record.section]};
}

}  // namespace deepcompile
