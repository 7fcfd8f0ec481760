// SPDX-License-Identifier: Apache-2.0
// Predicted against measured, instruction by instruction.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "report/records.h"
#include "sim/simulator.h"

namespace deepcompile {

// One instruction of the step. Times are means over its executions; a wait's
// is how long it stood still.
struct CompareRow {
  std::string section;  // "forward 0"
  uint32_t instr = 0;   // position in the section
  std::string label;    // "run fwd.0"
  std::optional<Nanos> predicted;
  std::optional<Nanos> measured;
  int64_t samples = 0;     // executions measured
  int64_t executions = 0;  // predicted

  // measured / predicted, if both are there and the prediction is not 0.
  std::optional<double> ratio() const;
};

// Rows in program order, then measured ones that the program does not have.
// Instructions without a duration on either side are left out. `program` is
// the step that was simulated, `plans` what it was merged from.
std::vector<CompareRow> compare(const StepProgram& program, const SimResult& predicted,
                                const PlanPrograms& plans, const std::vector<Record>& records);

// The rows as an aligned text table.
std::string compare_table(const std::vector<CompareRow>& rows);

// All executions of one kind of instruction in a step, added up: which part of
// the prediction is wrong. Transfers and copies that run beside compute count in full;
// what compute pays of them is in the rows of wait, accumulate, evict and await.
struct KindRow {
  std::string kind;  // "run", "gather", ...
  int64_t executions = 0, samples = 0;
  Nanos predicted, measured;
};

// In the order of the table of instructions, those of no time left out.
std::vector<KindRow> compare_kinds(const std::vector<CompareRow>& rows);
std::string kind_table(const std::vector<KindRow>& rows);

}  // namespace deepcompile
