// SPDX-License-Identifier: Apache-2.0
// How the verifiers say where a program is wrong. Used by them only.
#pragma once

#include <string>

#include "base/error.h"
#include "ir/text.h"

namespace deepcompile {

[[noreturn]] inline void fail_program(const StepProgram& program, const std::string& message) {
  throw UserError("[ir] " + program.name + ": " + message);
}

[[noreturn]] inline void fail_section(const StepProgram& program, const Section& section,
                                      const std::string& message) {
  fail_program(program, section_name(section) + ": " + message);
}

// "[ir] llama: backward 0, instruction 3 (reduce L0.q (g.L0.q)): ...". `at` counts from 0.
[[noreturn]] inline void fail_instr(const StepProgram& program, const Section& section, size_t at,
                                    const std::string& message) {
  fail_program(program, section_name(section) + ", instruction " + std::to_string(at + 1) + " (" +
                            print(program, section.instrs[at]) + "): " + message);
}

}  // namespace deepcompile
