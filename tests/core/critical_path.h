// SPDX-License-Identifier: Apache-2.0
// The longest chain of instructions that wait for each other: a lower bound of
// the step's time for every plan that keeps the order of the runs.
//
// Compute is one queue, in program order. Transfers start as soon as their
// data is there (a gather: when the shard has its last update; a reduce: when
// its gradients are made; a copy to the host: when what it copies is there)
// and never wait for a link or for memory. It is a step of the steady state:
// what the step before left whole, deferred or on the host is so. If the path
// is all runs, the step is bound by compute, and no prefetch helps it.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "ir/program.h"

namespace deepcompile {

struct InstrAt {
  uint32_t section = 0;
  uint32_t instr = 0;

  bool operator==(const InstrAt&) const = default;
};

struct CriticalPath {
  Nanos length;
  std::vector<InstrAt> instrs;  // from the first to the last of the chain
};

// How long an instruction takes by itself. Not asked for those that only wait,
// release or defer. A gather that applies a deferred update asks for both.
using InstrTime = std::function<Nanos(const Section&, const Instr&)>;

// `program` has passed verify; each section counts once.
CriticalPath critical_path(const StepProgram& program, const InstrTime& time);

}  // namespace deepcompile
