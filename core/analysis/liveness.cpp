// SPDX-License-Identifier: Apache-2.0
#include "analysis/liveness.h"

#include <algorithm>

namespace deepcompile {
namespace {

// Walks the step backwards. needed_[v] says whether v, as it is at the present
// point, has a use to come; making v ends that.
class Walk {
 public:
  explicit Walk(const StepProgram& program)
      : program_(program), needed_(program.values.size(), false) {}

  SectionLiveness section(const Section& section) {
    SectionLiveness out;
    out.frees.resize(section.instrs.size());
    out.saved = needed_by_graph(section);
    for (ValueId id : section.outputs) needed_[index(id)] = true;
    for (size_t i = section.instrs.size(); i-- > 0;) instr(section.instrs[i], &out.frees[i]);
    for (ValueId id : section.inputs) {
      if (!needed_[index(id)] && !out.frees.empty()) out.frees.front().push_back(id);
      needed_[index(id)] = false;
    }
    for (auto& each : out.frees) {
      std::sort(each.begin(), each.end());
      each.erase(std::unique(each.begin(), each.end()), each.end());
    }
    return out;
  }

 private:
  void instr(const Instr& instr, std::vector<ValueId>* frees) {
    const auto use = [&](ValueId id) {
      if (!needed_[index(id)]) frees->push_back(id);
      needed_[index(id)] = true;
    };
    if (instr.op == Op::kRun) {
      const Region& region = program_.region(*instr.region);
      for (ValueId id : region.outputs) {
        if (!needed_[index(id)]) frees->push_back(id);
      }
      for (ValueId id : region.outputs) needed_[index(id)] = false;
      for (const Operand& operand : region.inputs) {
        if (const auto* id = std::get_if<ValueId>(&operand)) use(*id);
      }
    }
    for (ValueId id : instr.values) use(id);
  }

  // What a later section of this graph needs: values belong to one graph, so
  // it is enough to look at those that this section or its forward makes.
  std::vector<ValueId> needed_by_graph(const Section& section) const {
    std::vector<ValueId> out;
    const auto add = [&](ValueId id) {
      if (needed_[index(id)]) out.push_back(id);
    };
    for (ValueId id : section.inputs) add(id);
    for (const Instr& each : section.instrs) {
      if (each.op != Op::kRun) continue;
      for (ValueId id : program_.region(*each.region).outputs) add(id);
    }
    std::sort(out.begin(), out.end());
    out.erase(std::unique(out.begin(), out.end()), out.end());
    return out;
  }

  const StepProgram& program_;
  std::vector<bool> needed_;
};

}  // namespace

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
