// SPDX-License-Identifier: Apache-2.0
// The instructions of a step in one row, with the compute time before each.
// Passes that move data beside compute ask it where a copy is done, and how
// early one must start.
//
// Compute alone: stalls are not in it, so a copy is done by then or earlier.
// Without a machine, times are rough: a region's measured time, else 300
// operations or one byte moved a picosecond; 25 bytes a nanosecond for copies.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "cost/cost_model.h"
#include "ir/program.h"

namespace deepcompile {

class StepClock {
 public:
  // `estimator` may be null.
  StepClock(const StepProgram& program, const Estimator* estimator);

  // Points number all instructions from 0. A section's end is the next one's start.
  size_t point(size_t section, size_t instr) const { return starts_[section] + instr; }
  size_t start(size_t section) const { return starts_[section]; }
  size_t end(size_t section) const { return starts_[section + 1]; }
  size_t points() const { return starts_.back(); }
  // Section and position in it; a section's end belongs to the next section.
  std::pair<size_t, size_t> place(size_t point) const;

  // Compute time of the step before the point.
  Nanos before(size_t point) const { return before_[point]; }
  // The first point in [first, last] whose time is `time` or later; else last.
  size_t first_at(Nanos time, size_t first, size_t last) const;
  // The last point in [first, last] whose time is `time` or earlier; else first.
  size_t last_at(Nanos time, size_t first, size_t last) const;

 private:
  std::vector<size_t> starts_;  // by section, and one past the last
  std::vector<Nanos> before_;   // by point, and one past the last
};

// How long an instruction takes; rough if `estimator` is null.
Nanos time_of(const StepProgram& program, const Estimator* estimator, const Instr& instr);

}  // namespace deepcompile
