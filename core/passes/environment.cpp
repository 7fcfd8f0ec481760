// SPDX-License-Identifier: Apache-2.0
#include "passes/environment.h"

#include <string>

#include "base/error.h"
#include "ir/text.h"

namespace deepcompile {

std::string point_name(const StepProgram& program, const MemoryAt& at) {
  const Section& section = program.sections[at.section];
  const Instr& instr = section.instrs[at.instr];
  std::string name(traits(instr.op).name);
  if (instr.param) name += " " + program.param(*instr.param).name;
  if (instr.region) name += " " + program.region(*instr.region).name;
  return "`" + name + "` in " + section_name(section);
}

MemoryTimeline timeline_within(const StepProgram& program, std::optional<Bytes> budget,
                               std::string_view pass, const MemoryTimeline* known) {
  MemoryTimeline timeline = known != nullptr ? *known : memory_timeline(program);
  if (!budget || timeline.peak <= *budget) return timeline;
  // A peak below every instruction's is what is there between steps.
  const bool somewhere = timeline.peak_point < timeline.points.size() &&
                         timeline.points[timeline.peak_point].during == timeline.peak;
  throw UserError(
      "[passes] " + std::string(pass) + ": the program needs " + pretty(timeline.peak) +
      (somewhere ? " at " + point_name(program, timeline.points[timeline.peak_point])
                 : std::string(" between steps")) +
      ", and the memory budget is " + pretty(*budget) + ", " + pretty(timeline.peak - *budget) +
      " less, before anything is gathered earlier or kept. Raise the budget, use more ranks, or "
      "a smaller batch.");
}

}  // namespace deepcompile
