// SPDX-License-Identifier: Apache-2.0
// The text form of a step program: what tests, bug reports and tools are
// written in.
//
//   step llama world=2 accumulation=1 clip reduce=f32
//
//   param embed bf16 4096 frozen                 # to the end of the line
//   param small f32 512 whole (norm.weight, head.bias)
//
//   value ids 512B rows=embed row=64             # 64 row numbers; rows of 64 elements
//   value g.norm 1KiB grad=small[0]
//
//   region fwd.0 code=0 workspace=410MiB moved=10MiB flops=1000000 time=3ms (ids, embed) -> (h0)
//
//   forward 0 (ids) -> (loss)
//     gather embed
//     wait embed
//     run fwd.0
//     release embed
//   end
//   update
//     norm
//     update small
//   end
//
//   because zero3_compile embed "kept sharded: ..."
//
// Names are as in is_name; a step, member, pass or object called otherwise is
// written in double quotes. Header words and region attributes are optional
// and in any order; `code` and each attribute default to 0, `time` to absent.
// Objects are named after their definition only.
//
// print and parse are inverses: parse(print(p)) is p, and print(parse(t)) is t
// for every t that print made.
#pragma once

#include <string>
#include <string_view>

#include "ir/program.h"

namespace deepcompile {

std::string print(const StepProgram& program);

// `source` names the text in errors: "[ir] <source>:<line>:<column>: ...".
// Checks names and grammar; verify (ir/verifier.h) checks the meaning.
StepProgram parse_program(std::string_view text, std::string_view source = "program");

// Pieces of the text form, for errors and reports.
std::string print(const StepProgram& program, const Instr& instr);      // "reduce L0 (g0, g1)"
std::string print(const StepProgram& program, const Operand& operand);  // "small[3]"
std::string section_name(const Section& section);                       // "backward 0", "update"

}  // namespace deepcompile
