// SPDX-License-Identifier: Apache-2.0
#include "analysis/next_use.h"

#include <algorithm>

#include "base/error.h"

namespace deepcompile {

NextUse::NextUse(const StepProgram& program)
    : param_uses_(program.params.size()), value_uses_(program.values.size()) {
  size_t position = 0;
  Nanos compute;
  const auto add = [&](std::vector<size_t>* uses) {
    if (uses->empty() || uses->back() != position) uses->push_back(position);
  };
  for (const Section& section : program.sections) {
    section_start_.push_back(position);
    for (const Instr& instr : section.instrs) {
      compute_before_.push_back(compute);
      if (instr.op == Op::kRun) {
        const Region& region = program.region(*instr.region);
        for (const Operand& operand : region.inputs) {
          if (const auto* ref = std::get_if<ParamRef>(&operand)) {
            add(&param_uses_[index(ref->param)]);
          } else {
            add(&value_uses_[index(std::get<ValueId>(operand))]);
          }
        }
        compute += region.time.value_or(Nanos{});
      }
      if (instr.op == Op::kReduce) {
        for (ValueId id : instr.values) add(&value_uses_[index(id)]);
      }
      ++position;
    }
  }
  compute_before_.push_back(compute);
}

std::optional<Use> NextUse::after(size_t section, size_t instr, ParamId what) const {
  return find(section, instr, param_uses_.at(index(what)));
}

std::optional<Use> NextUse::after(size_t section, size_t instr, ValueId what) const {
  return find(section, instr, value_uses_.at(index(what)));
}

std::optional<Use> NextUse::find(size_t section, size_t instr,
                                 const std::vector<size_t>& uses) const {
  const size_t from = section_start_.at(section) + instr;
  DC_CHECK(from + 1 < compute_before_.size(), "asked from outside of the program");
  const auto at = std::upper_bound(uses.begin(), uses.end(), from);
  if (at == uses.end()) return std::nullopt;
  const auto after = std::upper_bound(section_start_.begin(), section_start_.end(), *at);
  const auto in = static_cast<size_t>(after - section_start_.begin()) - 1;
  return Use{static_cast<uint32_t>(in), static_cast<uint32_t>(*at - section_start_[in]), *at - from,
             compute_before_[*at] - compute_before_[from + 1]};
}

}  // namespace deepcompile
