// SPDX-License-Identifier: Apache-2.0
// Bytes on one rank after each instruction of a step.
//
// The order is the program's, with every transfer done when it is issued, so
// this is what a plan needs whatever the machine's speed; the simulator says
// what is in flight when. It shows the last micro batch of a step in the
// steady state: with accumulation, the gradient sums are there from the
// start, and parameters that an earlier step left gathered are there too.
//
// Values live as liveness says. Section outputs belong to the caller and are
// counted to the section's end, a forward's to the end of its backward.
#pragma once

#include <cstdint>
#include <vector>

#include "ir/program.h"

namespace deepcompile {

struct MemoryParts {
  Bytes weights, masters, moments;        // always there
  Bytes gathered, reductions, gradients;  // by parameter instructions
  Bytes values, workspace;                // by runs

  Bytes total() const {
    return weights + masters + moments + gathered + reductions + gradients + values + workspace;
  }
  bool operator==(const MemoryParts&) const = default;
};

struct MemoryAt {
  uint32_t section = 0;
  uint32_t instr = 0;
  Bytes during;  // while it runs: its results and workspace are there, nothing is freed yet
  Bytes after;   // once what dies with it is freed
};

struct MemoryTimeline {
  Bytes base;                    // shards, kept weights and optimizer states
  std::vector<MemoryAt> points;  // one an instruction, in order
  Bytes peak;                    // the largest `during`, or base
  size_t peak_point = 0;         // which of `points`, the first if several
  MemoryParts at_peak;
};

// `program` has passed verify.
MemoryTimeline memory_timeline(const StepProgram& program);

}  // namespace deepcompile
