// SPDX-License-Identifier: Apache-2.0
// Gaps: where a step gives a parameter's full buffer back and gathers it again
// later. Closing one is what selective_gather does; auto weighs them too.
#pragma once

#include <compare>
#include <cstdint>
#include <utility>
#include <vector>

#include "cost/cost_model.h"
#include "ir/program.h"

namespace deepcompile {

// A gap by name: the `release`-th release of the parameter in the step, from 0.
struct GapId {
  ParamId param{};
  uint32_t release = 0;

  auto operator<=>(const GapId&) const = default;
};

// A point of the step: section and instruction, and their place in the
// memory timeline, which counts over all sections.
struct StepPoint {
  size_t section = 0, instr = 0, at = 0;
};

// From a release to the next gather of the same parameter.
struct Gap {
  GapId id;
  StepPoint release, gather;
  bool wraps = false;    // into the next micro batch or step
  bool updated = false;  // an update inside makes the buffer stale: the gather stays
  Bytes bytes;           // held for its length if it is closed
  Nanos saved;           // of the link's time, a step
  bool closed = false;

  // The points strictly inside: [first, last) pairs. `points` is of the step.
  std::vector<std::pair<size_t, size_t>> inside(size_t points) const {
    if (!wraps) return {{release.at + 1, gather.at}};
    return {{0, gather.at}, {release.at + 1, points}};
  }
  size_t length(size_t points) const { return gather.at - release.at - 1 + (wraps ? points : 0); }
};

// All gaps whose gather could be saved, in the order of parameters and time.
std::vector<Gap> find_gaps(const StepProgram& program, const Estimator& estimator);

// Positions in `gaps` in the order in which they are worth closing: most time
// saved a byte, then the shortest, then parameters in order.
std::vector<size_t> by_worth(const std::vector<Gap>& gaps, size_t points);

// Drops the closed gaps' releases, and their gathers and waits where they are
// in the release's own section.
void close_in(StepProgram& program, const std::vector<Gap>& gaps);

}  // namespace deepcompile
