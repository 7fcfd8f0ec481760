// SPDX-License-Identifier: Apache-2.0
// Parameters that are exchanged by rows: what numbers the rows, and how long
// they are good.
#include <algorithm>

#include "base/lists.h"
#include "ir/verifier.h"
#include "ir/verifier_error.h"

namespace deepcompile {
namespace {

// One forward takes the value from its caller, and no other value numbers rows
// of the same parameter there.
void check_numbers(const StepProgram& program, ValueId id) {
  const Value& value = program.value(id);
  const std::string& param = program.param(value.rows_of->param).name;
  if (!program.can_exchange(value.bytes, *value.rows_of)) {
    fail_program(program, "value " + value.name + " numbers more rows of " + param + " than " +
                              std::to_string(program.world) + " ranks can exchange. Correct it.");
  }
  int forwards = 0;
  for (const Section& section : program.sections) {
    if (section.kind != SectionKind::kForward || !contains(section.inputs, id)) continue;
    ++forwards;
    for (ValueId other : section.inputs) {
      const auto& rows = program.value(other).rows_of;
      if (other == id || !rows || rows->param != value.rows_of->param) continue;
      fail_section(program, section,
                   value.name + " and " + program.value(other).name + " both number rows of " +
                       param + ". Name one of them, or exchange all of it.");
    }
  }
  if (forwards == 1) return;
  fail_program(program, "value " + value.name + " numbers rows of " + param +
                            " and is an input of " + std::to_string(forwards) +
                            " forwards. List it in one.");
}

// The rows are those of one micro batch: a section that gathers them gives them back.
void check_releases(const StepProgram& program, const Section& section) {
  std::vector<bool> held(program.params.size(), false);
  for (const Instr& instr : section.instrs) {
    if (instr.op == Op::kGather) held[index(*instr.param)] = true;
    if (instr.op == Op::kRelease) held[index(*instr.param)] = false;
  }
  for (size_t i = 0; i < held.size(); ++i) {
    const ParamId id{static_cast<uint32_t>(i)};
    if (!held[i] || !program.rows_input(section, id)) continue;
    fail_section(program, section,
                 program.params[i].name +
                     " is gathered by rows, which are of this micro batch "
                     "alone, and not released. Put `release " +
                     program.params[i].name + "` before the end.");
  }
}

}  // namespace

void verify_rows(const StepProgram& program) {
  bool any = false;
  for (size_t i = 0; i < program.values.size(); ++i) {
    if (!program.values[i].rows_of) continue;
    any = true;
    check_numbers(program, ValueId{static_cast<uint32_t>(i)});
  }
  if (!any) return;
  for (const Section& section : program.sections) check_releases(program, section);
}

}  // namespace deepcompile
