// SPDX-License-Identifier: Apache-2.0
#include "passes/auto/builder.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

#include "analysis/footprint.h"
#include "base/error.h"
#include "passes/coalesce.h"
#include "passes/offload_activation.h"
#include "passes/offload_adam_states.h"
#include "passes/order_link.h"
#include "passes/prefetch.h"
#include "passes/rematerialize.h"
#include "passes/selective_gather.h"
#include "passes/zero0_compile.h"
#include "passes/zero1_compile.h"
#include "passes/zero3_compile.h"

namespace deepcompile {
namespace {

// More than any machine has; far enough from overflow.
constexpr Bytes kNoBudget{std::numeric_limits<int64_t>::max() / 4};
// Programs remembered of each stage.
constexpr size_t kStages = 4;

void run_pass(const Pass& pass, StepProgram& program, const PassEnvironment& environment) {
  PassContext context(program, std::string(pass.name()), environment);
  pass.run(program, context);
}

bool placed(const StepProgram& program, Placement placement) {
  return std::any_of(program.params.begin(), program.params.end(),
                     [&](const Param& param) { return param.placement == placement; });
}

void run_classical(StepProgram& program, const PassEnvironment& environment) {
  const std::string name = classical_pass(program);
  if (name == "zero0_compile") {
    run_pass(Zero0Compile(), program, environment);
  } else if (name == "zero1_compile") {
    run_pass(Zero1Compile(), program, environment);
  } else {
    run_pass(Zero3Compile(), program, environment);
  }
}

// Trials build the recomputation without the pass's measurements.
void recompute_quickly(const std::vector<RecomputableGraph>& graphs,
                       const std::vector<RegionId>& regions, StepProgram& program) {
  const std::vector<Recomputation> plans = plan_recomputations(program, graphs, regions);
  for (size_t g = 0; g < graphs.size(); ++g) {
    place_recomputation(graphs[g], plans[g], true, &program);
  }
}

void run_recompute(const AutoChoice& choice, StepProgram& program, PassEnvironment environment) {
  if (choice.recompute.empty()) return;
  environment.memory_budget = std::nullopt;  // as in trials, whatever it comes to
  run_pass(Rematerialize({.recompute = choice.recompute}), program, environment);
}

// Copies come in as early as the budget allows: here, a part of it.
PassEnvironment with_spare(const AutoChoice& choice, PassEnvironment environment) {
  *environment.memory_budget -= choice.spare;
  return environment;
}

// States move later, around their updates: while values wait, most of them will be away, all but
// the one that is updated.
Bytes states_away(const AutoChoice& choice, const StepProgram& program) {
  Bytes sum, most;
  for (ParamId id : choice.offload_states) {
    const Bytes bytes = footprint(program, id).states();
    sum += bytes;
    most = std::max(most, bytes);
  }
  return sum - most;
}

void run_offload_values(const AutoChoice& choice, StepProgram& program,
                        const PassEnvironment& environment,
                        const MemoryTimeline* timeline = nullptr) {
  if (choice.offload_values.empty()) return;
  PassEnvironment later = with_spare(choice, environment);
  *later.memory_budget += states_away(choice, program);
  run_pass(OffloadActivation({.values = choice.offload_values, .timeline = timeline}), program,
           later);
}

void run_place(const AutoChoice& choice, StepProgram& program, const PassEnvironment& environment) {
  if (choice.place == Place::kStep) return;
  run_pass(PlaceOptimizer({.place = choice.place, .ahead = choice.ahead}), program, environment);
}

// After place_optimizer: the moves stand around the updates, wherever those are.
void run_offload_states(const AutoChoice& choice, StepProgram& program,
                        const PassEnvironment& environment,
                        const MemoryTimeline* timeline = nullptr) {
  if (choice.offload_states.empty()) return;
  run_pass(OffloadAdamStates({.params = choice.offload_states, .timeline = timeline}), program,
           with_spare(choice, environment));
}

bool keeps(const AutoChoice& choice) {
  return !choice.keep || !choice.keep->empty();
}

// `timeline`: the program's, if it is known.
void run_keep(const AutoChoice& choice, StepProgram& program, const PassEnvironment& environment,
              const MemoryTimeline* timeline = nullptr) {
  if (!keeps(choice)) return;
  run_pass(SelectiveGather({.reserve = choice.reserve, .keep = choice.keep, .timeline = timeline}),
           program, environment);
}

bool prefetches(const AutoChoice& choice) {
  return !choice.limits.empty() || choice.prefetch;
}

void run_prefetch(const AutoChoice& choice, StepProgram& program,
                  const PassEnvironment& environment, const MemoryTimeline* timeline = nullptr) {
  if (!prefetches(choice)) return;
  PrefetchOptions options{.most = choice.limits, .any_order = true, .timeline = timeline};
  if (options.most.empty()) options.ahead = *choice.prefetch;
  run_pass(Prefetch(std::move(options)), program, environment);
}

bool same_runs(const AutoChoice& a, const AutoChoice& b) {
  return a.recompute == b.recompute && a.place == b.place && a.ahead == b.ahead;
}

bool same_memory(const AutoChoice& a, const AutoChoice& b) {
  return a.offload_values == b.offload_values && a.offload_states == b.offload_states &&
         a.spare == b.spare && same_runs(a, b);
}

bool same_keep(const AutoChoice& a, const AutoChoice& b) {
  return a.keep == b.keep && a.reserve == b.reserve && same_memory(a, b);
}

bool same_link(const AutoChoice& a, const AutoChoice& b) {
  return a.order_simulations == b.order_simulations && a.prefetch == b.prefetch &&
         a.limits == b.limits && same_keep(a, b);
}

}  // namespace

std::string classical_pass(const StepProgram& program) {
  if (placed(program, Placement::kSharded)) return "zero3_compile";
  return placed(program, Placement::kWhole) ? "zero1_compile" : "zero0_compile";
}

AutoBuilder::AutoBuilder(const StepProgram& plain, PassEnvironment environment)
    : environment_(std::move(environment)), classical_(plain) {
  DC_CHECK(environment_.estimator != nullptr && environment_.simulator != nullptr,
           "auto needs a machine");
  costs_ = std::make_unique<CachedCosts>(plain, *environment_.estimator);
  environment_.estimator = costs_.get();
  trial_environment_ = environment_;
  trial_environment_.simulator = nullptr;
  trial_environment_.reasons = false;
  if (!trial_environment_.memory_budget) trial_environment_.memory_budget = kNoBudget;
  run_classical(classical_, trial_environment_);
  scratch_ = classical_;
  graphs_ = recomputable_graphs(classical_);
  classical_instrs_ = instrs_of(classical_);
}

// The stage of a choice that is `same`, first in line from here on.
AutoBuilder::Stage* AutoBuilder::find(std::vector<Stage>& stages, const AutoChoice& choice,
                                      Same same) {
  const auto found = std::find_if(stages.begin(), stages.end(),
                                  [&](const Stage& each) { return same(each.choice, choice); });
  if (found == stages.end()) return nullptr;
  std::rotate(stages.begin(), found, found + 1);
  return &stages.front();
}

// The same, with the program as that stage left it.
AutoBuilder::Stage* AutoBuilder::restore(std::vector<Stage>& stages, const AutoChoice& choice,
                                         Same same) {
  Stage* known = find(stages, choice, same);
  if (known != nullptr && known->id != shown_) show(known->instrs, known->id);
  return known;
}

// Into the lists that are there: what they hold of memory is used again.
void AutoBuilder::show(const SectionInstrs& instrs, uint64_t stage) {
  for (size_t s = 0; s < instrs.size(); ++s) scratch_.sections[s].instrs = instrs[s];
  shown_ = stage;
}

// The program as it is, as this choice's stage; the one asked for longest ago goes.
AutoBuilder::Stage& AutoBuilder::remember(std::vector<Stage>& stages, const AutoChoice& choice) {
  if (stages.size() < kStages) stages.emplace_back();
  std::rotate(stages.begin(), stages.end() - 1, stages.end());
  Stage& stage = stages.front();
  shown_ = stage.id = ++stages_;
  stage.choice = choice;
  stage.instrs.resize(scratch_.sections.size());
  for (size_t s = 0; s < stage.instrs.size(); ++s) stage.instrs[s] = scratch_.sections[s].instrs;
  stage.reasons.clear();
  stage.timeline.reset();
  return stage;
}

// The program is as the stage has left it.
const MemoryTimeline& AutoBuilder::timeline_of(Stage& stage) const {
  if (!stage.timeline) stage.timeline = memory_timeline(scratch_);
  return *stage.timeline;
}

// What runs, and where the optimizer does.
AutoBuilder::Stage& AutoBuilder::runs_stage(const AutoChoice& choice) {
  if (Stage* known = restore(runs_stages_, choice, same_runs)) return *known;
  show(classical_instrs_, 0);
  if (!choice.recompute.empty()) recompute_quickly(graphs_, choice.recompute, scratch_);
  run_place(choice, scratch_, trial_environment_);
  return remember(runs_stages_, choice);
}

AutoBuilder::Stage& AutoBuilder::memory_stage(const AutoChoice& choice) {
  if (Stage* known = restore(memory_stages_, choice, same_memory)) return *known;
  Stage& runs = runs_stage(choice);
  if (choice.offload_values.empty() && choice.offload_states.empty()) return runs;
  const MemoryTimeline* timeline = &timeline_of(runs);
  shown_ = 0;
  run_offload_values(choice, scratch_, trial_environment_, timeline);
  if (!choice.offload_values.empty()) timeline = nullptr;
  run_offload_states(choice, scratch_, trial_environment_, timeline);
  return remember(memory_stages_, choice);
}

// After memory_stage, which is handed on. Throws as selective_gather does if the budget does not
// hold the program.
AutoBuilder::Stage& AutoBuilder::keep_stage(const AutoChoice& choice, Stage& memory) {
  if (!keeps(choice)) return memory;
  if (Stage* known = restore(keep_stages_, choice, same_keep)) return *known;
  const MemoryTimeline* timeline = choice.keep ? nullptr : &timeline_of(memory);
  shown_ = 0;
  run_keep(choice, scratch_, trial_environment_, timeline);
  return remember(keep_stages_, choice);
}

// After memory_stage: all but what starts together. Throws as keep_stage does.
void AutoBuilder::link_stage(const AutoChoice& choice, Stage& memory) {
  if (restore(link_stages_, choice, same_link) != nullptr) return;
  Stage& kept = keep_stage(choice, memory);
  const MemoryTimeline* timeline = prefetches(choice) ? &timeline_of(kept) : nullptr;
  shown_ = 0;
  if (timeline != nullptr) run_prefetch(choice, scratch_, trial_environment_, timeline);
  if (choice.order_simulations == 0) return;
  PassEnvironment environment = trial_environment_;
  environment.simulator = environment_.simulator;
  scratch_.reasons.clear();
  run_pass(OrderLink({.simulations = choice.order_simulations}), scratch_, environment);
  remember(link_stages_, choice).reasons = scratch_.reasons;
}

Trial AutoBuilder::measure(const AutoChoice& choice) {
  Trial trial;
  Stage* memory = nullptr;
  try {
    memory = &memory_stage(choice);
  } catch (const UserError&) {
    trial.peak = kNoBudget;
    trial.time = Nanos{std::numeric_limits<int64_t>::max()};
    return trial;
  }
  bool fits = true;
  try {  // these refuse programs above the budget, and leave them as they are
    link_stage(choice, *memory);
    shown_ = 0;
    if (choice.coalesce) coalesce(&scratch_);
  } catch (const UserError&) {
    fits = false;
  }
  ++simulations_;
  const SimSummary summary = environment_.simulate(scratch_);
  trial.time = summary.time;
  trial.peak = summary.peak;
  trial.fits = fits && summary.peak <= budget();
  if (!fits) trial.peak = std::max(trial.peak, budget() + Bytes{1});
  return trial;
}

Trial AutoBuilder::measure_plan(const StepProgram& plan) {
  ++simulations_;
  const SimSummary summary = environment_.simulate(plan);
  return {summary.time, summary.peak, summary.peak <= budget()};
}

Bytes AutoBuilder::peak_of_memory_choices(const AutoChoice& choice) {
  try {
    return timeline_of(memory_stage(choice)).peak;
  } catch (const UserError&) {
    return kNoBudget;
  }
}

AutoChoice AutoBuilder::spelled_out(const AutoChoice& choice) {
  AutoChoice out = choice;
  if (choice.limits.empty()) {
    out.limits.assign(classical_.sections.size(), choice.prefetch.value_or(Bytes{-1}));
    out.prefetch = std::nullopt;
  }
  if (choice.keep) return out;
  try {
    const MemoryTimeline& timeline = timeline_of(memory_stage(choice));
    out.keep = gaps_worth_closing(scratch_, trial_environment_,
                                  {.reserve = choice.reserve, .timeline = &timeline});
  } catch (const UserError&) {
    out.keep = std::vector<GapId>{};  // above the budget: nothing is kept
  }
  out.reserve = {};
  return out;
}

std::vector<Gap> AutoBuilder::gaps(const AutoChoice& choice) {
  try {
    memory_stage(choice);
  } catch (const UserError&) {
    return {};
  }
  return find_gaps(scratch_, *environment_.estimator);
}

void AutoBuilder::apply(const AutoChoice& choice, StepProgram& program) {
  PassEnvironment environment = environment_;
  environment.simulator = nullptr;
  environment.memory_budget = budget();
  run_classical(program, environment);
  run_recompute(choice, program, environment);
  run_place(choice, program, environment);
  run_offload_values(choice, program, environment);
  run_offload_states(choice, program, environment);
  run_keep(choice, program, environment);
  run_prefetch(choice, program, environment);
  if (const Stage* known = find(link_stages_, choice, same_link)) {
    replace_instrs(known->instrs, &program);
    program.reasons.insert(program.reasons.end(), known->reasons.begin(), known->reasons.end());
  } else if (choice.order_simulations > 0) {
    environment.simulator = environment_.simulator;
    run_pass(OrderLink({.simulations = choice.order_simulations}), program, environment);
  }
  if (choice.coalesce) run_pass(Coalesce(), program, environment);
}

}  // namespace deepcompile
