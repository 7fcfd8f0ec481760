// SPDX-License-Identifier: Apache-2.0
#include "analysis/liveness.h"

#include <algorithm>
#include <cstddef>

namespace deepcompile {
namespace {

// Walks the step backwards. needed_[v] says whether v, as it is at the present
// point, has a use to come; making v ends that.
class Walk {
 public:
  explicit Walk(const StepProgram& program)
      : program_(program),
        needed_(program.values.size(), false),
        known_(program.values.size(), false) {}

  SectionLiveness section(const Section& section) {
    SectionLiveness out;
    out.frees = FreeLists(section.instrs.size());
    out.saved = needed_by_graph(section);
    for (ValueId id : section.outputs) needed_[index(id)] = true;
    for (size_t i = section.instrs.size(); i-- > 0;) {
      instr(section, section.instrs[i], &out.frees);
      out.frees.finish(i);
    }
    const bool any = out.frees.size() > 0;
    for (ValueId id : section.inputs) {
      if (!needed_[index(id)] && any) out.frees.add(id);
      needed_[index(id)] = false;
    }
    if (any) out.frees.finish(0);
    return out;
  }

 private:
  void instr(const Section& section, const Instr& instr, FreeLists* frees) {
    const auto use = [&](ValueId id) {
      if (!needed_[index(id)]) frees->add(id);
      needed_[index(id)] = true;
    };
    if (instr.op == Op::kRun) {
      const Region& region = program_.region(*instr.region);
      for (ValueId id : region.outputs) {
        if (!needed_[index(id)]) frees->add(id);
      }
      for (ValueId id : region.outputs) needed_[index(id)] = false;
      for (const Operand& operand : region.inputs) {
        if (const auto* id = std::get_if<ValueId>(&operand)) use(*id);
      }
    }
    for (ValueId id : instr.values) use(id);
    if (instr.op == Op::kGather && section.kind == SectionKind::kForward) {
      if (const auto ids = program_.rows_input(section, *instr.param)) use(*ids);
    }
  }

  // What a later section of this graph needs: values belong to one graph, so
  // it is enough to look at those that this section or its forward makes.
  std::vector<ValueId> needed_by_graph(const Section& section) {
    if (std::find(needed_.begin(), needed_.end(), true) == needed_.end()) return {};
    std::fill(known_.begin(), known_.end(), 0);
    const auto add = [&](ValueId id) { known_[index(id)] = needed_[index(id)]; };
    for (ValueId id : section.inputs) add(id);
    for (const Instr& each : section.instrs) {
      if (each.op != Op::kRun) continue;
      for (ValueId id : program_.region(*each.region).outputs) add(id);
    }
    std::vector<ValueId> out;
    for (size_t i = 0; i < known_.size(); ++i) {
      if (known_[i]) out.push_back(ValueId{static_cast<uint32_t>(i)});
    }
    return out;
  }

  const StepProgram& program_;
  std::vector<uint8_t> needed_;
  std::vector<uint8_t> known_;  // by value: needed, and this graph's
};

}  // namespace

// Lists are short, and mostly sorted as they are.
void FreeLists::sort_from(size_t begin) {
  const auto first = ids_.begin() + static_cast<std::ptrdiff_t>(begin);
  const auto out_of_order = [](ValueId a, ValueId b) { return a >= b; };
  if (std::adjacent_find(first, ids_.end(), out_of_order) == ids_.end()) return;
  std::sort(first, ids_.end());
  ids_.erase(std::unique(first, ids_.end()), ids_.end());
}

Liveness analyze_liveness(const StepProgram& program) {
  Liveness out;
  out.sections.resize(program.sections.size());
  Walk walk(program);
  for (size_t i = program.sections.size(); i-- > 0;) {
    out.sections[i] = walk.section(program.sections[i]);
  }
  return out;
}

}  // namespace deepcompile
