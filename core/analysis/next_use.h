// SPDX-License-Identifier: Apache-2.0
// How far away the next use of a parameter or value is: in instructions, and
// in compute time. Prefetch asks how early a gather can be issued; keeping and
// offloading ask what is needed last.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "ir/program.h"

namespace deepcompile {

struct Use {
  uint32_t section = 0;
  uint32_t instr = 0;
  size_t distance = 0;  // instructions from the asking point; 1 is the very next
  Nanos compute;        // time of the runs strictly between; unmeasured runs count as 0

  bool operator==(const Use&) const = default;
};

class NextUse {
 public:
  explicit NextUse(const StepProgram& program);

  // The first instruction after (section, instr), in this step, that reads
  // `what`: a run of a region it is an input of, or a reduce. Members of a
  // parameter count as the parameter; copies to the host and back don't count.
  std::optional<Use> after(size_t section, size_t instr, ParamId what) const;
  std::optional<Use> after(size_t section, size_t instr, ValueId what) const;

 private:
  std::optional<Use> find(size_t section, size_t instr, const std::vector<size_t>& uses) const;

  std::vector<size_t> section_start_;            // position of each section's first instruction
  std::vector<Nanos> compute_before_;            // by position, and one past the end
  std::vector<std::vector<size_t>> param_uses_;  // positions, rising
  std::vector<std::vector<size_t>> value_uses_;
};

}  // namespace deepcompile
