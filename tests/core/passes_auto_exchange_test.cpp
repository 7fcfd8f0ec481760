// SPDX-License-Identifier: Apache-2.0
// What the search by levels frees too much, or in a way that is not the best, is put right.
#include <gtest/gtest.h>

#include <algorithm>

#include "layered_program.h"
#include "passes/auto/exchange.h"
#include "passes/auto/read_choice.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::passes_auto_exchange_test {
namespace {

UnitCost with_host(int64_t rate) {
  UnitCost costs;
  costs.host_rate = rate;
  return costs;
}

// A step and a budget, and all that tries choices for them.
struct Search {
  Search(StepProgram program, const Estimator& costs, double of_classical_peak, size_t threads = 2)
      : plain(std::move(program)),
        environment(planned_for(costs, budget_for(plain, costs, of_classical_peak)).environment),
        builder(plain, environment),
        builders(builder, plain, environment, threads),
        menu(builder.classical(), costs) {}

  static Bytes budget_for(const StepProgram& plain, const Estimator& costs, double part) {
    StepProgram classical = plain;
    run_pipeline(classical, PassRegistry::with_builtins(), {classical_pass(plain)});
    return part_of(simulate(classical, costs).peak, part);
  }

  Found found(AutoChoice choice) {
    const Trial trial = builder.measure(choice);
    return {std::move(choice), trial};
  }

  // All that runs again and all states away, or only those.
  Found everything(bool recompute, bool states) {
    AutoChoice choice;
    choice.keep = std::nullopt;
    for (const RecomputeUnit& unit : menu.recompute()) {
      if (!recompute) break;
      choice.recompute.insert(choice.recompute.end(), unit.regions.begin(), unit.regions.end());
    }
    for (const Movable& each : menu.states()) {
      if (states) choice.offload_states.push_back(ParamId{each.id});
    }
    std::sort(choice.recompute.begin(), choice.recompute.end());
    std::sort(choice.offload_states.begin(), choice.offload_states.end());
    return found(std::move(choice));
  }

  StepProgram plain;
  PassEnvironment environment;
  AutoBuilder builder;
  Builders builders;
  MemoryMenu menu;
};

StepProgram layers(int count, int64_t numel = 256) {
  return parse_program(layered_program({.layers = count, .numel = numel}));
}

TEST(AutoExchange, WithMemoryForAllOfItNothingStaysFreed) {
  const UnitCost costs = with_host(2);
  Search search(layers(8), costs, 2);
  const Found start = search.everything(true, true);
  ASSERT_TRUE(start.trial.fits);
  const Found parts = give_back_parts(search.builders, search.menu, start, 200);
  EXPECT_LT(parts.trial.time, start.trial.time);
  const Found singles = give_back_singly(search.builders, search.menu, parts, 200);
  EXPECT_LE(singles.trial.time, search.everything(false, false).trial.time)
      << describe(singles.choice);
}

// Freed and given back: until no single one that fits without makes the step shorter.
TEST(AutoExchange, NothingThatFitsMakesTheStepShorterWhenGivenBack) {
  const UnitCost costs = with_host(2);
  for (const double part : {1.0, 0.9, 0.8}) {
    Search search(layers(8), costs, part);
    const Found start = search.everything(true, true);
    ASSERT_TRUE(start.trial.fits) << part;
    const Found found = give_back_singly(search.builders, search.menu, start, 10'000);
    EXPECT_LT(found.trial.time, start.trial.time);
    for (const ParamId id : found.choice.offload_states) {
      AutoChoice choice = found.choice;
      std::erase(choice.offload_states, id);
      EXPECT_FALSE(better(search.builder.measure(choice), found.trial)) << part;
    }
    for (const RecomputeUnit& unit : search.menu.recompute()) {
      AutoChoice choice = found.choice;
      for (const RegionId id : unit.regions) std::erase(choice.recompute, id);
      EXPECT_FALSE(better(search.builder.measure(choice), found.trial)) << part;
    }
  }
}

// Copies over a slow link, where regions could run again.
TEST(AutoExchange, AnotherWayIsTakenWhereItIsTheBetterOne) {
  const UnitCost costs = with_host(1);
  Search search(layers(8), costs, 0.97);
  const Found start = search.everything(false, true);
  ASSERT_TRUE(start.trial.fits);
  const Found pairs = exchange_parts(search.builders, search.menu, start, 200);
  EXPECT_LT(pairs.trial.time, start.trial.time);
  EXPECT_FALSE(pairs.choice.recompute.empty()) << describe(pairs.choice);
  EXPECT_LT(pairs.choice.offload_states.size(), start.choice.offload_states.size());
  const Found more = free_more(search.builders, search.menu, start, 4);
  EXPECT_LT(more.trial.time, start.trial.time);
  EXPECT_FALSE(more.choice.recompute.empty()) << describe(more.choice);
}

TEST(AutoExchange, TriesNoMoreThanItMay) {
  const UnitCost costs = with_host(2);
  Search search(layers(8), costs, 0.9, 1);
  const Found start = search.everything(true, true);
  for (const auto improve : {exchange_parts, give_back_parts, give_back_singly}) {
    for (const int most : {0, 1, 5}) {
      const int before = search.builder.simulations();
      const Found found = improve(search.builders, search.menu, start, most);
      EXPECT_LE(search.builder.simulations() - before, most);
      EXPECT_TRUE(most > 0 || found.choice == start.choice);
    }
  }
}

// On steps of all kinds: within the budget, never worse, and the same with any number of threads.
TEST(AutoExchange, NeverMakesAPlanWorse) {
  uint32_t improved = 0;
  for (uint32_t seed = 0; seed < seeds(40); ++seed) {
    const UnitCost costs = with_host(2);
    std::vector<Found> ends;
    for (const size_t threads : {1, 3}) {
      Search search(random_program(seed, {.replicated = seed % 5 == 4}), costs, 1.05, threads);
      const Found start = search.everything(seed % 2 == 0, true);
      if (!start.trial.fits) continue;
      Found found = exchange_parts(search.builders, search.menu, start, 40);
      found = give_back_parts(search.builders, search.menu, std::move(found), 20);
      found = free_more(search.builders, search.menu, std::move(found), 2);
      found = give_back_singly(search.builders, search.menu, std::move(found), 20);
      EXPECT_EQ(search.builder.measure(found.choice), found.trial) << seed;
      EXPECT_TRUE(found.trial.fits) << seed;
      EXPECT_FALSE(better(start.trial, found.trial)) << seed;
      improved += better(found.trial, start.trial);
      ends.push_back(std::move(found));
    }
    if (ends.size() < 2) continue;
    EXPECT_EQ(ends[0].choice, ends[1].choice) << seed;
  }
  EXPECT_GT(improved, seeds(20));
}

// The plan of `auto`: what waits on the host, or runs again, has to.
TEST(AutoExchange, AutoMovesAndComputesAgainNoMoreThanItMust) {
  const UnitCost costs = with_host(2);
  uint32_t freed = 0;
  for (const double part : {0.9, 0.8, 0.7, 0.6}) {
    Search search(layers(8, 4096), costs, part);
    StepProgram plan = search.plain;
    PipelineOptions options;
    options.environment = search.environment;
    run_pipeline(plan, PassRegistry::with_builtins(), {"auto"}, options);
    const Found found = search.found(read_choice(search.builder, plan));
    ASSERT_TRUE(found.trial.fits) << part;
    const auto check = [&](const AutoChoice& without) {
      EXPECT_FALSE(better(search.builder.measure(without), found.trial))
          << part << ": " << describe(without) << " instead of " << describe(found.choice);
      ++freed;
    };
    for (const ParamId id : found.choice.offload_states) {
      AutoChoice choice = found.choice;
      std::erase(choice.offload_states, id);
      check(choice);
    }
    for (const ValueId id : found.choice.offload_values) {
      AutoChoice choice = found.choice;
      std::erase(choice.offload_values, id);
      check(choice);
    }
  }
  EXPECT_GT(freed, 4u);
}

}  // namespace
}  // namespace deepcompile::passes_auto_exchange_test
