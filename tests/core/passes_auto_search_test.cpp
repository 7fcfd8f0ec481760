// SPDX-License-Identifier: Apache-2.0
// Where memory is short: the smallest peak is found under any budget that is
// below it, and a plan under any that is not.
#include <gtest/gtest.h>

#include <algorithm>

#include "analysis/memory_timeline.h"
#include "ir/verifier.h"
#include "layered_program.h"
#include "overlapping_program.h"
#include "passes/auto/search.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::passes_auto_search_test {
namespace {

UnitCost fast_host() {
  UnitCost costs;
  costs.host_rate = 4;
  return costs;
}

PassEnvironment environment_for(const Estimator& costs, Bytes budget) {
  return planned_for(costs, budget).environment;
}

Found searched(const StepProgram& plain, const Estimator& costs, Bytes budget, size_t threads = 2) {
  const PassEnvironment environment = environment_for(costs, budget);
  AutoBuilder builder(plain, environment);
  Builders builders(builder, plain, environment, threads);
  const MemoryMenu menu(builder.classical(), costs);
  return LevelSearch(builders, menu, simulations_for(builder.classical())).run();
}

Bytes classical_peak(const StepProgram& plain, const Estimator& costs) {
  StepProgram classical = plain;
  run_pipeline(classical, PassRegistry::with_builtins(), {classical_pass(plain)});
  return simulate(classical, costs).peak;
}

// From the plain plan's peak down: a plan as long as the budget is not below the smallest peak, and
// below it that peak, whatever the budget.
void check_all_budgets(const StepProgram& plain, Bytes smallest, int64_t from, int64_t to) {
  const UnitCost costs = fast_host();
  const Bytes peak = classical_peak(plain, costs);
  for (int64_t percent = from; percent >= to; percent -= 2) {
    const Bytes budget{peak.value * percent / 100};
    const Found found = searched(plain, costs, budget);
    const std::string what = std::to_string(percent) + "%: " + describe(found.choice);
    EXPECT_EQ(found.trial.fits, budget >= smallest) << what << ", " << found.trial.peak.value;
    EXPECT_LE(found.trial.peak, std::max(budget, smallest)) << what;
  }
}

// By hand, in units of h: between steps a shard of each weight, 8 x 0.5. The peak is at b.0: its
// inputs d.1, s.0.0, s.0.1 and a.0; its outputs d.0 and g.0; its workspace; w.0 whole; and of the
// other layers' gradients, reduced, a half each.
//   4 + (1 + 6 + 6 + 1) + (1 + 1) + 1 + 1 + 7 x 0.5 = 25.5, and h.0, which nobody reads again
TEST(AutoSearch, FindsTheSmallestPeakUnderAnyBudget) {
  const StepProgram plain = parse_program(overlapping_program());
  const UnitCost costs = fast_host();
  const Found none = searched(plain, costs, Bytes{4096});
  ASSERT_FALSE(none.trial.fits);
  EXPECT_GE(none.trial.peak, Bytes{25 * 4096}) << describe(none.choice);
  EXPECT_LE(none.trial.peak, Bytes{30 * 4096}) << describe(none.choice);
  check_all_budgets(plain, none.trial.peak, 99, 9);
}

TEST(AutoSearch, FindsTheSameWithAnyNumberOfThreads) {
  const StepProgram plain = parse_program(layered_program({.layers = 8}));
  const UnitCost costs = fast_host();
  const Bytes peak = classical_peak(plain, costs);
  for (const int64_t percent : {75, 90, 120}) {
    const Bytes budget{peak.value * percent / 100};
    const Found alone = searched(plain, costs, budget, 1);
    for (const size_t threads : {2, 3, 7}) {
      const Found found = searched(plain, costs, budget, threads);
      EXPECT_EQ(found.choice, alone.choice) << percent << " " << threads;
      EXPECT_EQ(found.trial, alone.trial) << percent << " " << threads;
    }
  }
}

// As many equal activations as a deep model has: each is little of the whole.
TEST(AutoSearch, FindsItInADeepStep) {
  const int layers = kSanitized ? 40 : 1200;
  const StepProgram plain = parse_program(overlapping_program({.layers = layers, .numel = 4}));
  const UnitCost costs = fast_host();
  const Found none = searched(plain, costs, Bytes{4096});
  ASSERT_FALSE(none.trial.fits);
  // Shards and gradients take 256 bytes each.
  EXPECT_LE(none.trial.peak, Bytes{layers * 512 + 24 * 4096}) << describe(none.choice);
}

// Also on steps of all kinds, no choice of the search's has a smaller peak.
TEST(AutoSearch, NoChoiceHasASmallerPeak) {
  uint32_t compared = 0;
  for (uint32_t seed = 0; seed < seeds(60); ++seed) {
    StepProgram plain = random_program(seed, {.replicated = seed % 5 == 4});
    const UnitCost costs;
    const Found none = searched(plain, costs, Bytes{1});
    ASSERT_FALSE(none.trial.fits) << seed;
    AutoBuilder builder(plain, environment_for(costs, Bytes{1}));
    const MemoryMenu menu(builder.classical(), costs);
    std::mt19937 random(seed);
    for (int tries = 0; tries < 20; ++tries) {
      AutoChoice choice;
      for (const RecomputeUnit& unit : menu.recompute()) {
        if (pick(random, 0, 2) == 0) continue;
        choice.recompute.insert(choice.recompute.end(), unit.regions.begin(), unit.regions.end());
      }
      std::sort(choice.recompute.begin(), choice.recompute.end());
      for (const Movable& each : menu.values(choice.recompute, true)) {
        choice.offload_values.push_back(ValueId{each.id});
      }
      std::sort(choice.offload_values.begin(), choice.offload_values.end());
      leave_out_remade(menu, true, &choice);
      for (const Movable& each : menu.states()) {
        if (pick(random, 0, 3) > 0) choice.offload_states.push_back(ParamId{each.id});
      }
      std::sort(choice.offload_states.begin(), choice.offload_states.end());
      choice.spare = builder.budget();
      choice.place = pick(random, 0, 1) == 0 ? Place::kStep : Place::kNextForward;
      const Trial trial = builder.measure(choice);
      EXPECT_LT(trial.peak, Bytes{int64_t{1} << 50}) << seed << ": cannot be built";
      EXPECT_GE(trial.peak, none.trial.peak) << seed << ": " << describe(choice);
      ++compared;
    }
  }
  EXPECT_EQ(compared, 20 * seeds(60));
}

// f.1 runs again before b.2, which reads a.2 of it, and would have b.2's own activations beside its
// own. What it is given, h.1 and a.1, waits on the host until then, though f.0 runs again too.
TEST(AutoSearch, WhatRegionsAreGivenThatRunAgainCanWaitOnTheHost) {
  const StepProgram plain = parse_program(overlapping_program({.layers = 4}));
  const UnitCost costs = fast_host();
  AutoBuilder builder(plain, environment_for(costs, Bytes{1 << 20}));
  const MemoryMenu menu(builder.classical(), costs);
  std::vector<RegionId> again;
  for (int i = 0; i < 4; ++i) again.push_back(*plain.find_region("f." + std::to_string(i)));
  std::vector<std::string> names;
  for (const Movable& each : menu.given(again)) names.push_back(plain.value(ValueId{each.id}).name);
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names, (std::vector<std::string>{"a.1", "a.2", "a.3", "h.1", "h.2", "h.3"}));
}

// A plan at the smallest peak is one that the passes make, too.
TEST(AutoSearch, TheTightestPlanIsMade) {
  const StepProgram plain = parse_program(overlapping_program());
  const UnitCost costs = fast_host();
  const Bytes smallest = searched(plain, costs, Bytes{4096}).trial.peak;
  StepProgram plan = plain;
  run_pipeline(plan, PassRegistry::with_builtins(), {"auto"}, planned_for(costs, smallest));
  EXPECT_EQ(error_of([&] { verify_plan(plan); }), "no error");
  EXPECT_LE(simulate(plan, costs).peak, smallest);
  EXPECT_LE(memory_timeline(plan).peak, smallest);
}

}  // namespace
}  // namespace deepcompile::passes_auto_search_test
