// SPDX-License-Identifier: Apache-2.0
#include "report/explain.h"

#include <cstdio>
#include <utility>
#include <vector>

#include "ir/text.h"

namespace deepcompile {
namespace {

std::string percent(Nanos part, Nanos whole) {
  char text[32];
  const double share =
      whole.value == 0 ? 0
                       : 100.0 * static_cast<double>(part.value) / static_cast<double>(whole.value);
  std::snprintf(text, sizeof(text), "%.0f%%", share);
  return text;
}

std::string counted(int64_t n, const std::string& noun) {
  return std::to_string(n) + " " + noun + (n == 1 ? "" : "s");
}

std::string headline(const StepProgram& program, const SimResult& result) {
  std::string text = "step " + program.name + ": " + counted(program.world, "rank") + ", " +
                     counted(program.accumulation, "micro-step") + ", gradients reduced in " +
                     std::string(to_string(program.reduce_dtype)) +
                     (program.clip ? ", clipped by global norm\n" : "\n");
  text += "predicted: " + pretty(result.time) + " a step, peak " + pretty(result.peak) +
          " a rank (" + pretty(result.resident) + " between steps), compute busy " +
          percent(result.compute_busy, result.time) + ", link busy " +
          percent(result.link_busy, result.time) + ", compute stalled " + pretty(result.stall) +
          "\n";
  return text;
}

std::string placement_text(const StepProgram& program, ParamId id) {
  const Param& param = program.param(id);
  std::string text = "param " + param.name + ": " + std::string(to_string(param.dtype)) + ", " +
                     std::to_string(param.numel) + " elements, " + pretty(program.full_bytes(id)) +
                     " whole, ";
  switch (param.placement) {
    case Placement::kSharded:
      text += "sharded: " + pretty(program.shard_bytes(id)) + " a rank";
      break;
    case Placement::kWhole:
      text += "kept whole, its optimizer states sharded";
      break;
    case Placement::kReplicated:
      text += "replicated with its optimizer states";
      break;
  }
  if (!param.trainable) text += ", frozen";
  if (param.members.size() > 1) text += ", packs " + counted(param.members.size(), "parameter");
  return text + "\n";
}

// What happened to a parameter in one instruction, with its time.
std::string event_text(const Instr& instr, const SimItem& item) {
  std::string text = std::string(traits(instr.op).name) + " #" + std::to_string(item.instr);
  const bool timed = item.resource != Resource::kNone;
  if (timed) text += " " + pretty(item.end - item.start);
  if (timed && item.resource == Resource::kLink && item.start > item.issue) {
    text += " after " + pretty(item.start - item.issue) + " for the link";
  }
  if (item.stall > Nanos{0}) text += " (compute stalled " + pretty(item.stall) + ")";
  return text;
}

// For each parameter, one line a section that touches it; first micro-step only.
std::vector<std::string> histories(const StepProgram& program, const SimResult& result) {
  std::vector<std::string> lines(program.params.size());
  std::vector<int64_t> last_section(program.params.size(), -1);
  for (const SimItem& item : result.items) {
    const Section& section = program.sections[item.section];
    const Instr& instr = section.instrs[item.instr];
    if (!instr.param || item.micro_step != 0) continue;
    const size_t param = index(*instr.param);
    if (last_section[param] != item.section) {
      lines[param] += (lines[param].empty() ? "  " : "\n  ") + section_name(section) + ": ";
      last_section[param] = item.section;
    } else {
      lines[param] += ", ";
    }
    lines[param] += event_text(instr, item);
  }
  return lines;
}

}  // namespace

std::string explain(const StepProgram& program, const SimResult& result) {
  std::string text = headline(program, result);
  const std::vector<std::string> lines = histories(program, result);
  for (size_t i = 0; i < program.params.size(); ++i) {
    const ParamId id{static_cast<uint32_t>(i)};
    text += "\n" + placement_text(program, id);
    text += lines[i].empty() ? "  no instruction moves it\n" : lines[i] + "\n";
    for (const Reason& reason : program.reasons) {
      if (reason.object == program.param(id).name) {
        text += "  why: " + reason.text + " [" + reason.pass + "]\n";
      }
    }
  }
  bool opened = false;
  for (const Reason& reason : program.reasons) {
    if (program.find_param(reason.object)) continue;
    if (!std::exchange(opened, true)) text += "\n";
    text += "why" + (reason.object.empty() ? "" : " " + reason.object) + ": " + reason.text + " [" +
            reason.pass + "]\n";
  }
  return text;
}

}  // namespace deepcompile
