// SPDX-License-Identifier: Apache-2.0
#include "ir/split_step.h"

#include "base/error.h"
#include "ir/text.h"

namespace deepcompile {
namespace {

[[noreturn]] void fail(const StepProgram& merged, const std::string& message) {
  throw UserError("[ir] split of " + merged.name + ": " + message);
}

// One part, and where its tables begin in the merged program.
class Part {
 public:
  Part(const StepProgram& merged, StepProgram plain, size_t values, size_t regions)
      : merged_(merged), out_(std::move(plain)), values_(values), regions_(regions) {}

  void take(Section& section, const Section& from) {
    section.instrs.clear();
    for (Instr instr : from.instrs) {
      if (instr.param) instr.param = param(*instr.param);
      if (instr.region) {
        instr.region = RegionId{own(index(*instr.region), regions_, out_.regions.size())};
      }
      for (ValueId& id : instr.values) {
        id = ValueId{own(index(id), values_, out_.values.size())};
      }
      section.instrs.push_back(std::move(instr));
    }
  }

  StepProgram& program() { return out_; }

 private:
  ParamId param(ParamId id) {
    const Param& wanted = merged_.param(id);
    const auto known = out_.find_param(wanted.name);
    return known ? *known : out_.add_param(wanted);
  }

  uint32_t own(size_t id, size_t start, size_t count) const {
    if (id >= start && id < start + count) return static_cast<uint32_t>(id - start);
    fail(merged_, "an instruction of " + out_.name +
                      " names a value or region of another graph. A pass moved it across "
                      "graphs: mend the pass.");
  }

  const StepProgram& merged_;
  StepProgram out_;
  size_t values_, regions_;
};

}  // namespace

std::vector<StepProgram> split_step(const StepProgram& merged,
                                    const std::vector<StepProgram>& graphs,
                                    const StepProgram& update) {
  std::vector<StepProgram> out;
  size_t values = 0, regions = 0;
  for (size_t k = 0; k <= graphs.size(); ++k) {
    const bool last = k == graphs.size();
    Part part(merged, last ? update : graphs[k], values, regions);
    for (Section& section : part.program().sections) {
      const auto from = merged.find_section(section.kind, last ? 0 : static_cast<uint32_t>(k));
      if (!from) fail(merged, section_name(section) + " is gone. Passes keep all sections.");
      part.take(section, merged.sections[index(*from)]);
    }
    values += part.program().values.size();
    regions += part.program().regions.size();
    out.push_back(std::move(part.program()));
  }
  if (values != merged.values.size() || regions != merged.regions.size()) {
    fail(merged,
         "it has other values or regions than its parts. Split with the programs it was merged "
         "from; passes add neither.");
  }
  return out;
}

}  // namespace deepcompile
