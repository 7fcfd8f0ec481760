// SPDX-License-Identifier: Apache-2.0
#include "report/explain.h"

#include <algorithm>
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

// The host link, where a plan uses it.
std::string host_text(const SimResult& result) {
  if (result.to_host_busy == Nanos{0} && result.to_device_busy == Nanos{0}) return "";
  return ", copies to the host " + percent(result.to_host_busy, result.time) + " and back " +
         percent(result.to_device_busy, result.time);
}

std::string headline(const StepProgram& program, const SimResult& result) {
  std::string text = "step " + program.name + ": " + counted(program.world, "rank") + ", " +
                     counted(program.accumulation, "micro-step") + ", gradients reduced in " +
                     std::string(to_string(program.reduce_dtype)) +
                     (program.clip ? ", clipped by global norm\n" : "\n");
  text += "predicted: " + pretty(result.time) + " a step, peak " + pretty(result.peak) +
          " a rank (" + pretty(result.resident) + " between steps), compute busy " +
          percent(result.compute_busy, result.time) + ", link busy " +
          percent(result.link_busy, result.time) + host_text(result) + ", compute stalled " +
          pretty(result.stall) + "\n";
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
  if (program.rows_read(id) > 0) {
    text += ", exchanged by rows: " + std::to_string(program.rows_read(id)) + " a rank";
  }
  if (!param.trainable) text += ", frozen";
  if (param.members.size() > 1) text += ", packs " + counted(param.members.size(), "parameter");
  return text + "\n";
}

// What happened to a parameter in one instruction, with its time.
std::string event_text(const SimItem& item) {
  std::string text = std::string(traits(item.op).name) + " #" + std::to_string(item.instr);
  const bool timed = item.resource != Resource::kNone;
  if (timed) text += " " + pretty(item.end - item.start);
  if (timed && item.resource != Resource::kCompute && item.start > item.issue) {
    const bool ranks = item.resource == Resource::kLink;
    text +=
        " after " + pretty(item.start - item.issue) + " for the " + (ranks ? "link" : "host link");
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
    lines[param] += event_text(item);
  }
  return lines;
}

// The alternatives of one parameter; "else" marks them.
std::string told(const std::vector<Alternative>& alternatives, const std::string& object) {
  std::string text;
  for (const Alternative& each : alternatives) {
    const auto& objects = each.objects;
    if (std::find(objects.begin(), objects.end(), object) == objects.end()) continue;
    text += "  else: " + print(each) + "\n";
  }
  return text;
}

// The alternatives of regions, one line for all that are alike, and of the step.
std::string other_choices(const StepProgram& program,
                          const std::vector<Alternative>& alternatives) {
  std::string text;
  for (const Alternative& each : alternatives) {
    if (!each.objects.empty() && !program.find_region(each.objects.front())) continue;
    text += text.empty() ? "\nelse" : "else";
    if (!each.objects.empty()) text += " " + each.objects.front();
    if (each.objects.size() > 1) {
      text += " (and " + std::to_string(each.objects.size() - 1) + " like it)";
    }
    text += ": " + print(each) + "\n";
  }
  return text;
}

}  // namespace

std::string explain(const StepProgram& program, const SimResult& result,
                    const std::vector<Alternative>& alternatives) {
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
    text += told(alternatives, program.param(id).name);
  }
  bool opened = false;
  for (const Reason& reason : program.reasons) {
    if (program.find_param(reason.object)) continue;
    if (!std::exchange(opened, true)) text += "\n";
    text += "why" + (reason.object.empty() ? "" : " " + reason.object) + ": " + reason.text + " [" +
            reason.pass + "]\n";
  }
  return text + other_choices(program, alternatives);
}

}  // namespace deepcompile
