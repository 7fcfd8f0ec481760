// SPDX-License-Identifier: Apache-2.0
// What the runtime measured, as the reports read it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/units.h"
#include "ir/program.h"

namespace deepcompile {

// One execution of one instruction of a loaded plan. Times are on one clock,
// whose origin does not matter.
struct Record {
  int32_t plan = 0;  // the id the runtime gave when it loaded the plan
  uint32_t section = 0;
  uint32_t instr = 0;
  Nanos start;
  Nanos end;
};

// The programs behind the plan ids, in the order that merge_steps took them
// (graphs first, then the update), so that graph k here is graph k there.
using PlanPrograms = std::vector<std::pair<int32_t, const StepProgram*>>;

// Resolves records to the names that reports use. The programs must outlive it.
class RecordNames {
 public:
  explicit RecordNames(const PlanPrograms& plans);

  struct Entry {
    const StepProgram* program;
    const Instr* instr;
    std::string section;  // "forward 0", numbered as in the merged program
  };
  // Throws UserError if the record's plan, section or instruction is unknown.
  Entry find(const Record& record) const;

 private:
  struct Plan {
    int32_t id;
    const StepProgram* program;
    std::vector<std::string> sections;
  };
  std::vector<Plan> plans_;
};

}  // namespace deepcompile
