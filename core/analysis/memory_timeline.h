// SPDX-License-Identifier: Apache-2.0
// Bytes on one rank after each instruction of a step.
//
// The order is the program's, with every transfer done when it is issued, so
// this is what a plan needs whatever the machine's speed; the simulator says
// what is in flight when. Both follow StepMachine.
//
// It shows the steady state: what an earlier step left gathered, deferred or
// on the host is so at the start. With accumulation, a point has the most that
// the instruction needs in any micro batch of the step: usually the last, when
// the gradient sums are there from the start.
//
// Values live as liveness says. Section outputs belong to the caller and are
// counted to the section's end, a forward's to the end of its backward.
#pragma once

#include <cstdint>
#include <vector>

#include "ir/program.h"

namespace deepcompile {

struct MemoryParts {
  Bytes weights;                          // always there
  Bytes masters, moments;                 // of states on the device
  Bytes gathered, reductions, gradients;  // by parameter instructions; gradients with local sums
  Bytes values, workspace;                // by runs

  Bytes total() const {
    return weights + masters + moments + gathered + reductions + gradients + values + workspace;
  }
  bool operator==(const MemoryParts&) const = default;
};

struct MemoryAt {
  uint32_t section = 0;
  uint32_t instr = 0;
  Bytes during;  // the most while it runs: its results and workspace are there
  Bytes after;   // once what dies with it is freed
};

struct MemoryTimeline {
  Bytes base;                    // between steps: shards, kept weights, states on the device
  std::vector<MemoryAt> points;  // one an instruction, in order
  Bytes peak;                    // the largest `during`, or what is there between steps
  size_t peak_point = 0;         // which of `points`, the first if several
  MemoryParts at_peak;
};

// `program` has passed verify.
MemoryTimeline memory_timeline(const StepProgram& program);

// Its peak alone, in less time.
Bytes memory_peak(const StepProgram& program);

}  // namespace deepcompile
