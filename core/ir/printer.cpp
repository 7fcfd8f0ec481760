// SPDX-License-Identifier: Apache-2.0
#include "ir/lexer.h"
#include "ir/text.h"

namespace deepcompile {
namespace {

std::string word(std::string_view text) {
  return is_name(text) ? std::string(text) : quote(text);
}

std::string ref_text(const StepProgram& program, ParamRef ref) {
  const std::string& name = program.param(ref.param).name;
  return ref.member == 0 ? name : name + "[" + std::to_string(ref.member) + "]";
}

template <typename Items, typename Show>
void append_list(std::string* out, const Items& items, Show show) {
  *out += '(';
  bool first = true;
  for (const auto& item : items) {
    if (!first) *out += ", ";
    first = false;
    *out += show(item);
  }
  *out += ')';
}

void append_values(std::string* out, const StepProgram& program, const std::vector<ValueId>& ids) {
  append_list(out, ids, [&](ValueId id) -> const std::string& { return program.value(id).name; });
}

void append_header(std::string* out, const StepProgram& program) {
  *out += "step " + word(program.name) + " world=" + std::to_string(program.world) +
          " accumulation=" + std::to_string(program.accumulation);
  if (program.clip) *out += " clip";
  if (program.boundary) *out += " boundary";
  *out += " reduce=";
  *out += to_string(program.reduce_dtype);
  *out += '\n';
}

void append_param(std::string* out, const Param& param) {
  *out += "param " + param.name + " ";
  *out += to_string(param.dtype);
  *out += " " + std::to_string(param.numel);
  if (param.placement != Placement::kSharded) {
    *out += ' ';
    *out += to_string(param.placement);
  }
  if (!param.trainable) *out += " frozen";
  if (param.members != std::vector<std::string>{param.name}) {
    *out += ' ';
    append_list(out, param.members, word);
  }
  *out += '\n';
}

void append_value(std::string* out, const StepProgram& program, const Value& value) {
  *out += "value " + value.name + " " + to_string(value.bytes);
  if (value.grad_of) *out += " grad=" + ref_text(program, *value.grad_of);
  if (value.rows_of) {
    *out += " rows=" + program.param(value.rows_of->param).name +
            " row=" + std::to_string(value.rows_of->row);
  }
  *out += '\n';
}

void append_region(std::string* out, const StepProgram& program, const Region& region) {
  *out += "region " + region.name + " code=" + std::to_string(region.code);
  if (region.workspace.value != 0) *out += " workspace=" + to_string(region.workspace);
  if (region.moved.value != 0) *out += " moved=" + to_string(region.moved);
  if (region.flops != 0) *out += " flops=" + std::to_string(region.flops);
  if (region.time) *out += " time=" + to_string(*region.time);
  if (region.once) *out += " once";
  if (region.checkpoint) *out += " checkpoint";
  *out += ' ';
  append_list(out, region.inputs, [&](const Operand& each) { return print(program, each); });
  *out += " -> ";
  append_values(out, program, region.outputs);
  *out += '\n';
}

void append_instr(std::string* out, const StepProgram& program, const Instr& instr) {
  *out += traits(instr.op).name;
  if (instr.param) *out += " " + program.param(*instr.param).name;
  if (instr.region) *out += " " + program.region(*instr.region).name;
  if (traits(instr.op).takes_values) {
    *out += ' ';
    append_values(out, program, instr.values);
  }
}

void append_section(std::string* out, const StepProgram& program, const Section& section) {
  *out += section_name(section);
  if (section.kind != SectionKind::kUpdate) {
    *out += ' ';
    append_values(out, program, section.inputs);
    *out += " -> ";
    append_values(out, program, section.outputs);
  }
  *out += '\n';
  for (const Instr& instr : section.instrs) {
    *out += "  ";
    append_instr(out, program, instr);
    *out += '\n';
  }
  *out += "end\n";
}

void append_reason(std::string* out, const Reason& reason) {
  *out += "because " + word(reason.pass) + " ";
  if (!reason.object.empty()) *out += word(reason.object) + " ";
  *out += quote(reason.text) + "\n";
}

}  // namespace

std::string print(const StepProgram& program) {
  std::string out;
  append_header(&out, program);
  if (!program.params.empty()) out += '\n';
  for (const Param& param : program.params) append_param(&out, param);
  if (!program.values.empty()) out += '\n';
  for (const Value& value : program.values) append_value(&out, program, value);
  if (!program.regions.empty()) out += '\n';
  for (const Region& region : program.regions) append_region(&out, program, region);
  if (!program.sections.empty()) out += '\n';
  for (const Section& section : program.sections) append_section(&out, program, section);
  if (!program.reasons.empty()) out += '\n';
  for (const Reason& reason : program.reasons) append_reason(&out, reason);
  return out;
}

std::string print(const StepProgram& program, const Instr& instr) {
  std::string out;
  append_instr(&out, program, instr);
  return out;
}

std::string print(const StepProgram& program, const Operand& operand) {
  if (const auto* ref = std::get_if<ParamRef>(&operand)) return ref_text(program, *ref);
  return program.value(std::get<ValueId>(operand)).name;
}

std::string section_name(const Section& section) {
  std::string out(to_string(section.kind));
  if (section.kind != SectionKind::kUpdate) out += " " + std::to_string(section.graph);
  return out;
}

}  // namespace deepcompile
