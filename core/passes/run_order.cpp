// SPDX-License-Identifier: Apache-2.0
#include "passes/run_order.h"

#include <algorithm>
#include <variant>
#include <vector>

namespace deepcompile {
namespace {

// By region: the place of its first run in the step.
std::vector<size_t> first_runs(const SectionInstrs& sections, size_t regions) {
  std::vector<size_t> out(regions, SIZE_MAX);
  size_t at = 0;
  for (const std::vector<Instr>& instrs : sections) {
    for (const Instr& instr : instrs) {
      if (instr.op == Op::kRun) out[index(*instr.region)] = std::min(out[index(*instr.region)], at);
      ++at;
    }
  }
  return out;
}

}  // namespace

std::vector<std::vector<RegionId>> input_writers(const StepProgram& program) {
  std::vector<bool> made(program.values.size(), false);
  for (const Region& region : program.regions) {
    for (ValueId id : region.outputs) made[index(id)] = true;
  }
  std::vector<std::vector<RegionId>> out(program.values.size());
  for (size_t i = 0; i < program.regions.size(); ++i) {
    if (!program.regions[i].once) continue;
    for (const Operand& operand : program.regions[i].inputs) {
      const auto* value = std::get_if<ValueId>(&operand);
      if (value == nullptr || made[index(*value)]) continue;
      out[index(*value)].push_back(RegionId{static_cast<uint32_t>(i)});
    }
  }
  return out;
}

std::optional<std::string> moved_run(const SectionInstrs& before, const SectionInstrs& now,
                                     const StepProgram& program) {
  std::vector<RegionId> once;
  for (size_t i = 0; i < program.regions.size(); ++i) {
    if (program.regions[i].once) once.push_back(RegionId{static_cast<uint32_t>(i)});
  }
  if (once.empty()) return std::nullopt;
  const auto said = [&](RegionId a, RegionId b) {
    return "`run " + program.region(a).name + "` is on the other side of `run " +
           program.region(b).name +
           "`, which draws random numbers or writes to its inputs: the result would not be the "
           "same. Leave them in their order.";
  };
  const auto was = first_runs(before, program.regions.size());
  const auto is = first_runs(now, program.regions.size());
  const auto earlier = [&](RegionId a, RegionId b) { return was[index(a)] < was[index(b)]; };
  std::sort(once.begin(), once.end(), earlier);
  for (size_t i = 1; i < once.size(); ++i) {
    if (is[index(once[i - 1])] > is[index(once[i])]) return said(once[i - 1], once[i]);
  }
  const auto writers = input_writers(program);
  size_t at = 0;
  for (const std::vector<Instr>& instrs : now) {
    for (const Instr& instr : instrs) {
      const size_t place = at++;
      if (instr.op != Op::kRun) continue;
      for (const Operand& operand : program.region(*instr.region).inputs) {
        const auto* value = std::get_if<ValueId>(&operand);
        if (value == nullptr) continue;
        for (RegionId other : writers[index(*value)]) {
          const bool before_it = place < is[index(other)];
          if (other != *instr.region && earlier(*instr.region, other) != before_it) {
            return said(*instr.region, other);
          }
        }
      }
    }
  }
  return std::nullopt;
}

}  // namespace deepcompile
