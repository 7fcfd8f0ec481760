// SPDX-License-Identifier: Apache-2.0
// What a step can give up for memory, in the order in which `auto` takes it:
// forward regions to run again, saved activations and optimizer states to keep
// on the host. Estimates; the simulator has the last word.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cost/cost_model.h"
#include "ir/program.h"
#include "passes/recomputation.h"

namespace deepcompile {

// Regions that are worth running again together: one layer's, say.
struct RecomputeUnit {
  std::vector<RegionId> regions;
  Bytes saved;  // at the end of the forward
  Nanos time;   // a step
};

struct Movable {
  uint32_t id = 0;  // of a value, or of a parameter with its states
  Bytes bytes;
  Nanos transfer;  // one way, a step
};

class MemoryMenu {
 public:
  // `program` is classical: its values live as they do without recomputation.
  MemoryMenu(const StepProgram& program, const Estimator& estimator);

  // Most bytes a nanosecond first, earlier layers before later ones: their
  // activations wait longest.
  const std::vector<RecomputeUnit>& recompute() const { return recompute_; }
  // Activations that wait for the backward if these regions run again, those
  // that wait longest first. Without those that are not worth an instruction
  // each, unless all are asked for.
  std::vector<Movable> values(const std::vector<RegionId>& recompute, bool all = false) const;
  // By value: whether it waits, exactly; what these regions make does if someone needs it before
  // they run again. And whether they make it.
  std::vector<bool> waits(const std::vector<RegionId>& recompute) const;
  std::vector<bool> made_by(const std::vector<RegionId>& regions) const;
  // What both is true of.
  std::vector<Movable> given(const std::vector<RegionId>& recompute) const;
  // Those used latest in a forward first: they have most time to come back. Unusually large
  // ones last.
  const std::vector<Movable>& states() const { return states_; }
  // Compute of the forwards and of the whole step, micro batches included.
  Nanos forward_compute() const { return forward_compute_; }
  Nanos compute() const { return compute_; }

 private:
  // A forward's run: its graph, its position there, and what it is grouped with.
  struct Run {
    size_t graph = 0, run = 0, group = 0;
    Nanos time;  // a step
  };
  using ByRun = std::vector<std::vector<bool>>;  // by graph, by run

  void add_up_compute();
  void group_runs();
  void find_touched();
  void find_units();
  void find_states();
  void put_unusual_last();
  ByRun none() const;
  RegionId region(const Run& run) const { return graphs_[run.graph].runs[run.run]; }
  // Whether a value of this graph waits for the backward if the marked runs are made again there.
  bool waits_in(size_t graph, const ByRun& again, ValueId id) const;
  // Calls visit(value) for each value that then waits.
  template <typename Visit>
  void for_each_waiting(const ByRun& again, Visit visit) const;
  struct Step {
    std::vector<size_t> groups;  // that join; none if nothing helps
    Bytes gain;                  // that no longer wait then
    double worth = 0;            // bytes a nanosecond
  };
  Step weighed(const std::vector<size_t>& groups, ByRun* again) const;
  Step best_step(const std::vector<bool>& taken, ByRun* again) const;
  void mark(const std::vector<size_t>& groups, bool on, ByRun* again) const;
  Movable movable(ValueId id) const;
  void add_units(const std::vector<size_t>& groups, Bytes saved);

  const StepProgram& program_;
  const Estimator& estimator_;
  std::vector<RecomputableGraph> graphs_;
  std::vector<Run> runs_;                    // in program order
  std::vector<std::vector<size_t>> groups_;  // members, positions in runs_
  std::vector<bool> eligible_;               // by group
  std::vector<Nanos> group_time_;            // by group, a step
  // By group: values that its runs make or read, with their graphs. No others wait otherwise if it
  // joins.
  std::vector<std::vector<std::pair<size_t, ValueId>>> touched_;
  std::vector<RecomputeUnit> recompute_;
  std::vector<Movable> states_;
  Nanos forward_compute_, compute_;
};

}  // namespace deepcompile
