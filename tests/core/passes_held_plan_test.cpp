// SPDX-License-Identifier: Apache-2.0
// `auto` while another plan holds: that one is a candidate, as it is.
#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

#include "analysis/memory_timeline.h"
#include "ir/verifier.h"
#include "layered_program.h"
#include "overlapping_program.h"
#include "passes/auto/held_plan.h"
#include "passes/auto/memory_menu.h"
#include "passes/auto/plan.h"
#include "passes/auto/read_choice.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::passes_held_plan_test {
namespace {

struct Planned {
  StepProgram program;
  std::string error;
};

Planned plan(const StepProgram& plain, const Estimator& costs, Bytes budget,
             const StepProgram* held = nullptr, int simulations = 0) {
  const AutoPlan pass({.simulations = simulations});
  PipelineOptions options = planned_for(costs, budget);
  options.environment.held = held;
  Planned out{plain, ""};
  out.error = error_of([&] { run_pipeline(out.program, {&pass}, options); });
  return out;
}

// The same step, measured again: other times, other scratch memory.
StepProgram measured_again(StepProgram program, uint32_t seed, int64_t workspace_percent) {
  std::mt19937 random(seed);
  for (Region& region : program.regions) {
    region.time = Nanos{region.time.value_or(Nanos{1000}).value * pick(random, 60, 160) / 100};
    region.workspace = Bytes{region.workspace.value * workspace_percent / 100};
  }
  return program;
}

// `plan`'s instructions in a step of the same tables.
StepProgram on(StepProgram plain, const StepProgram& plan) {
  for (size_t s = 0; s < plan.sections.size(); ++s) {
    plain.sections[s].instrs = plan.sections[s].instrs;
  }
  return plain;
}

SimSummary result_of(const StepProgram& program, const Estimator& costs) {
  const SimSummary simulated = simulate_summary(program, costs);
  return {simulated.time, std::max(simulated.peak, memory_timeline(program).peak)};
}

// By few simulations, so that the search alone often finds less than the plan that holds.
TEST(HeldPlan, IsNeverExchangedForAWorseOne) {
  uint32_t compared = 0, stayed = 0, worse_without = 0;
  for (uint32_t seed = 0; seed < seeds(24); ++seed) {
    const StepProgram plain = seed % 2 == 0 ? random_program(seed, {.replicated = seed % 5 == 4})
                                            : parse_program(overlapping_program({.layers = 3}));
    const UnitCost costs;
    StepProgram classical = plain;
    run_pipeline(classical, PassRegistry::with_builtins(), {classical_pass(plain)});
    const Bytes peak = result_of(classical, costs).peak;
    for (const int64_t percent : {50, 80, 120}) {
      const Bytes budget{peak.value * percent / 100};
      const Planned first = plan(plain, costs, budget, nullptr, 200);
      if (first.error != "no error") continue;
      const StepProgram again =
          measured_again(plain, seed, 100 - static_cast<int64_t>(seed % 3) * 10);
      const SimSummary held = result_of(on(again, first.program), costs);
      if (held.peak > budget) continue;
      const Planned second = plan(again, costs, budget, &first.program, 30);
      ASSERT_EQ(second.error, "no error") << seed << " at " << percent << "%";
      const SimSummary found = result_of(second.program, costs);
      EXPECT_LE(found.time, held.time) << seed << " at " << percent << "%";
      EXPECT_LE(found.peak, budget) << seed;
      EXPECT_EQ(error_of([&] { verify_plan(second.program); }), "no error") << seed;
      const Planned without = plan(again, costs, budget, nullptr, 30);
      worse_without +=
          without.error != "no error" || result_of(without.program, costs).time > held.time;
      stayed += sections_text(second.program) == sections_text(first.program);
      ++compared;
    }
  }
  std::cout << compared << " plans made again, " << stayed << " stayed, " << worse_without
            << " would have been worse\n";
  EXPECT_GT(compared, seeds(24));
  EXPECT_GT(stayed, 0u);
  EXPECT_GT(worse_without, 0u);
}

// A plan that no choice comes to: e's states, 64 times the others', move when all but one of the
// other gradients have been used up. In parameters' order e is updated first, with all gradients
// there.
class TighterThanAnyChoice : public testing::Test {
 protected:
  void SetUp() override {
    plain_ = parse_program(
        replaced(replaced(layered_program({.layers = 4, .numel = 4096, .header = "reduce=bf16"}),
                          "param e f32 4096", "param e bf16 262144"),
                 "value g.e 16384B", "value g.e 524288B"));
    AutoBuilder builder(plain_, planned_for(costs_, Bytes{1 << 30}).environment);
    const MemoryMenu menu(builder.classical(), costs_);
    AutoChoice choice;
    for (const Movable& each : menu.states()) choice.offload_states.push_back(ParamId{each.id});
    std::sort(choice.offload_states.begin(), choice.offload_states.end());
    choice.spare = builder.budget();
    held_ = plain_;
    builder.apply(choice, held_);
    // The last one's states leave in the next forward, as the passes have it.
    std::vector<Instr>& update = held_.sections.back().instrs;
    const auto rank = [&](const Instr& instr) {
      const std::string& name = held_.param(*instr.param).name;
      return name == "v.3" ? 2 : name == "e" ? 1 : 0;
    };
    std::stable_sort(update.begin(), update.end(),
                     [&](const Instr& a, const Instr& b) { return rank(a) < rank(b); });
    ASSERT_EQ(error_of([&] { verify_plan(held_); }), "no error");
    budget_ = result_of(held_, costs_).peak;
  }

  UnitCost costs_;
  StepProgram plain_, held_;
  Bytes budget_;
};

TEST_F(TighterThanAnyChoice, Stays) {
  EXPECT_TRUE(plan(plain_, costs_, budget_).error.starts_with("[passes] auto: no plan fits"));
  const Planned again = plan(plain_, costs_, budget_, &held_);
  EXPECT_EQ(again.error, "no error");
  EXPECT_EQ(sections_text(again.program), sections_text(held_));
}

TEST_F(TighterThanAnyChoice, IsAFailureAsEverIfItDoesNotFit) {
  const Planned again = plan(plain_, costs_, budget_ - Bytes{1}, &held_);
  EXPECT_TRUE(again.error.starts_with("[passes] auto: no plan fits the memory budget of "))
      << again.error;
  EXPECT_NE(again.error.find("the smallest peak found is "), std::string::npos) << again.error;
}

TEST_F(TighterThanAnyChoice, OfAnotherStepIsNoCandidate) {
  const StepProgram once =
      parse_program(replaced(print(plain_), "region emb code=1", "region emb code=1 once"));
  EXPECT_EQ(plan(once, costs_, budget_, &held_).error, plan(once, costs_, budget_).error);
  EXPECT_NE(plan(once, costs_, budget_, &held_).error, "no error");
  const StepProgram shorter = parse_program(layered_program({.layers = 3}));
  const Bytes roomy{1 << 30};
  EXPECT_EQ(sections_text(plan(shorter, costs_, roomy, &held_, 100).program),
            sections_text(plan(shorter, costs_, roomy, nullptr, 100).program));
}

// What it was made for stays with it, and its choice can be read off it once more.
TEST(HeldPlan, KeepsItsReasons) {
  const StepProgram plain = parse_program(overlapping_program());
  const UnitCost costs;
  const Bytes budget{140'000};
  const Planned first = plan(plain, costs, budget);
  ASSERT_EQ(first.error, "no error");
  Planned again = first;
  for (int time = 0; time < 2; ++time) {  // the same costs: nothing better is to be found
    again = plan(plain, costs, budget, &again.program);
    ASSERT_EQ(sections_text(again.program), sections_text(first.program));
    const auto reasons = reasons_for(again.program, "auto", "");
    ASSERT_EQ(reasons.size(), 4u);
    EXPECT_TRUE(reasons[0].starts_with("step ")) << reasons[0];
    EXPECT_EQ(reasons[1], "the plan that holds stays: none that was found is better");
    EXPECT_TRUE(reasons[2].starts_with("chosen: zero3_compile, ")) << reasons[2];
    EXPECT_TRUE(reasons[3].starts_with("levels: ")) << reasons[3];
  }
  AutoBuilder builder(plain, planned_for(costs, budget).environment);
  EXPECT_EQ(read_choice(builder, again.program), read_choice(builder, first.program));
}

}  // namespace
}  // namespace deepcompile::passes_held_plan_test
