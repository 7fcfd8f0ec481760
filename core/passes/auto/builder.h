// SPDX-License-Identifier: Apache-2.0
// Makes plans of choices: runs the passes, with explicit options, on a copy of
// the program, and asks the simulator. `auto` and next_best try choices by it.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cost/cached_costs.h"
#include "passes/auto/choice.h"
#include "passes/optimizer_placement.h"
#include "passes/pass.h"
#include "passes/recomputation.h"

namespace deepcompile {

class AutoBuilder {
 public:
  // `plain` is compute-only and timed, and outlives this; the environment has an
  // estimator and a simulator. Runs the classical pass of the placements:
  // zero0_compile, zero1_compile or zero3_compile.
  AutoBuilder(const StepProgram& plain, PassEnvironment environment);

  const StepProgram& classical() const { return classical_; }
  Bytes budget() const { return *trial_environment_.memory_budget; }
  const PassEnvironment& environment() const { return environment_; }
  int simulations() const { return simulations_; }  // so far
  bool early_updates() const { return environment_.early_updates && !classical_.clip; }

  // Never throws for a choice that does not work or fit: the trial says so.
  Trial measure(const AutoChoice& choice);
  // Of a plan that is there already, over the program's tables, as it is.
  Trial measure_plan(const StepProgram& plan);
  // Only what recomputation and offload leave, without keeping or prefetch;
  // not simulated. For finding how much must go.
  Bytes peak_of_memory_choices(const AutoChoice& choice);

  // The choice with its gaps and limits spelled out, as measure takes them.
  AutoChoice spelled_out(const AutoChoice& choice);
  // The gaps that a choice's program has before any is closed.
  std::vector<Gap> gaps(const AutoChoice& choice);

  // The program of the last question, as far as that built it.
  const StepProgram& last() const { return scratch_; }

  // Makes `program`, a copy of `plain`, the plan, with the passes' reasons.
  void apply(const AutoChoice& choice, StepProgram& program);

 private:
  // A program on the way to a choice's plan: trials in a row mostly share some.
  struct Stage {
    uint64_t id = 0;
    AutoChoice choice;
    SectionInstrs instrs;
    std::vector<Reason> reasons;             // of order_link, if that is its last pass
    std::optional<MemoryTimeline> timeline;  // once asked for
  };
  using Same = bool (*)(const AutoChoice&, const AutoChoice&);

  Stage* find(std::vector<Stage>& stages, const AutoChoice& choice, Same same);
  void show(const SectionInstrs& instrs, uint64_t stage);
  Stage* restore(std::vector<Stage>& stages, const AutoChoice& choice, Same same);
  Stage& remember(std::vector<Stage>& stages, const AutoChoice& choice);
  const MemoryTimeline& timeline_of(Stage& stage) const;
  Stage& runs_stage(const AutoChoice& choice);
  Stage& memory_stage(const AutoChoice& choice);
  Stage& keep_stage(const AutoChoice& choice, Stage& memory);
  void link_stage(const AutoChoice& choice, Stage& memory);

  PassEnvironment environment_;        // the caller's, but for costs_
  PassEnvironment trial_environment_;  // without simulator and reasons
  std::unique_ptr<CachedCosts> costs_;
  StepProgram classical_;
  StepProgram scratch_;
  uint64_t shown_ = 0;   // the stage whose instructions scratch_ has, if any
  uint64_t stages_ = 0;  // made so far
  SectionInstrs classical_instrs_;
  std::vector<RecomputableGraph> graphs_;  // of the classical program
  // The last few, latest first.
  std::vector<Stage> runs_stages_, memory_stages_, keep_stages_, link_stages_;
  int simulations_ = 0;
};

// The classical pass for the program's placements, by name.
std::string classical_pass(const StepProgram& program);

}  // namespace deepcompile
