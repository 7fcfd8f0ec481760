// SPDX-License-Identifier: Apache-2.0
// What recomputing a part of one block does to the memory of a step, without
// building the program: where bytes go and where they come, and for how long
// the device computes more.
//
// Places are two an instruction of the program as it is: 2i is just before
// point i, where recomputation runs; 2i + 1 is while it runs.
#pragma once

#include <cstddef>
#include <vector>

#include "analysis/memory_timeline.h"
#include "passes/recomputation.h"
#include "passes/step_clock.h"

namespace deepcompile {

struct RecomputationEffect {
  struct Range {
    size_t first, last;  // places [first, last)
    Bytes bytes;         // more there; less if negative
  };
  std::vector<Range> ranges;
  Nanos time;        // of compute, once a micro batch
  size_t again = 0;  // runs

  Bytes at(size_t place) const;
};

// Memory by place, before any recomputation.
std::vector<Bytes> bytes_by_place(const MemoryTimeline& timeline);

class EffectModel {
 public:
  // All outlive the model; `estimator` may be null.
  EffectModel(const StepProgram& program, const RecomputableGraph& graph, const StepClock& clock,
              const Estimator* estimator);

  // Of the runs of `block` that `plan` runs again.
  RecomputationEffect effect(size_t block, const Recomputation& plan) const;

  // The place between the graph's forward and its backward.
  size_t middle() const { return 2 * clock_.start(graph_.backward); }

 private:
  struct Whole {
    size_t first, last;  // the backward's instructions [first, last)
  };
  using Ranges = std::vector<RecomputationEffect::Range>;

  void outputs(size_t run, const Recomputation& plan, Ranges* out) const;
  void inputs(size_t run, const Recomputation& plan, Ranges* out) const;
  void parameters(size_t run, const Recomputation& plan, std::vector<ParamId>* seen,
                  Ranges* out) const;
  size_t before(size_t backward_instr) const {
    return 2 * clock_.point(graph_.backward, backward_instr);
  }
  // The place after the value's last use in the forward, and in the program as it is.
  size_t forward_end(const ValueUse& value) const;
  size_t end(const ValueUse& value) const;

  const StepProgram& program_;
  const RecomputableGraph& graph_;
  const StepClock& clock_;
  std::vector<Nanos> times_;               // by run
  std::vector<std::vector<Whole>> whole_;  // by parameter, in the backward, in order
  bool gathered_ = false;
};

}  // namespace deepcompile
