// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>

#include "base/error.h"
#include "layered_program.h"
#include "planned_for.h"
#include "report/explain.h"
#include "report/next_best.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::report_next_best_test {
namespace {

const Alternative* about(const std::vector<Alternative>& all, const std::string& object,
                         const std::string& instead) {
  for (const Alternative& each : all) {
    const bool it =
        std::find(each.objects.begin(), each.objects.end(), object) != each.objects.end();
    if (it && each.instead == instead) return &each;
  }
  return nullptr;
}

// Classical ZeRO-3, on 1 byte a ns: keeping b whole from forward to backward
// saves one gather of 512 ns and holds 512 B, but not at the peak in run b.b,
// where b is whole anyway.
TEST(NextBest, ComparesEachSingleChoice) {
  const UnitCost costs;
  const StepProgram plain = parse_program(kTwoLayers), plan = two_layers_zero3();
  const PassEnvironment environment = planned_for(costs).environment;
  const auto all = next_best(plain, plan, environment);
  const Alternative* keep = about(all, "b", "kept whole");
  ASSERT_NE(keep, nullptr);
  EXPECT_EQ(keep->chosen, "released and gathered again from forward 0 to backward 0");
  EXPECT_EQ(keep->time, Nanos{-512});
  EXPECT_EQ(keep->peak, Bytes{0});
  EXPECT_TRUE(keep->fits);
  EXPECT_EQ(print(*keep),
            "released and gathered again from forward 0 to backward 0; kept whole instead: -512 "
            "ns, +0 B");
  // a is held at the peak.
  EXPECT_EQ(about(all, "a", "kept whole")->peak, Bytes{512});
  ASSERT_NE(about(all, "f.b", "run again"), nullptr);
  ASSERT_NE(about(all, "a", "on the host"), nullptr);
  // Places of the optimizer are the step's.
  const auto step = std::find_if(all.begin(), all.end(),
                                 [](const Alternative& each) { return each.objects.empty(); });
  ASSERT_NE(step, all.end());
  EXPECT_EQ(step->chosen, "updates in step");
}

// What a planner's plan would be with leave that only the user can give.
TEST(NextBest, SaysWhatUpdatesInTheBackwardWouldGive) {
  const UnitCost costs;
  const StepProgram plain = parse_program(layered_program({.layers = 8, .numel = 4096}));
  StepProgram classical = plain;
  run_pipeline(classical, PassRegistry::with_builtins(), {"zero3_compile"});
  const Bytes budget{simulate(classical, costs).peak.value * 8 / 10};
  const auto planned = [&](bool early) {
    PipelineOptions options = planned_for(costs, budget);
    options.environment.early_updates = early;
    StepProgram plan = plain;
    run_pipeline(plan, PassRegistry::with_builtins(), {"auto"}, options);
    return plan;
  };
  const auto early_in = [&](const StepProgram& plan, bool early) -> std::optional<Alternative> {
    PassEnvironment environment = planned_for(costs, budget).environment;
    environment.early_updates = early;
    for (const Alternative& each : next_best(plain, plan, environment)) {
      if (each.instead == "planned with leave to update there") return each;
    }
    return std::nullopt;
  };
  const StepProgram plan = planned(false), other = planned(true);
  const auto found = early_in(plan, false);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->time, simulate(other, costs).time - simulate(plan, costs).time);
  EXPECT_LT(found->time, Nanos{0});
  EXPECT_TRUE(found->objects.empty());
  EXPECT_FALSE(early_in(other, true));
  EXPECT_FALSE(early_in(classical, false));  // not the planner's
}

TEST(NextBest, SaysWhatWouldNotFit) {
  const UnitCost costs;
  const StepProgram plain = parse_program(kTwoLayers), plan = two_layers_zero3();
  const Bytes peak = simulate(plan, costs).peak;
  const auto all = next_best(plain, plan, planned_for(costs, peak).environment);
  const Alternative* keep = about(all, "a", "kept whole");
  ASSERT_NE(keep, nullptr);
  EXPECT_FALSE(keep->fits);
  EXPECT_NE(print(*keep).find(", above the budget"), std::string::npos);
}

TEST(NextBest, EqualLayersAreAskedAboutOnce) {
  const UnitCost costs;
  // Two layers of equal code and sizes.
  const StepProgram plain = parse_program(R"(
step like world=2
param a f32 128
param b f32 128
value x 100B
value h 100B
value y 100B
value t 100B
value d 100B
value e 100B
value g.a 512B grad=a
value g.b 512B grad=b
region fa code=0 time=100ns (x, a) -> (h)
region fb code=0 time=100ns (h, b) -> (y)
region bb code=1 time=100ns (t, h, b) -> (d, g.b)
region ba code=1 time=100ns (d, x, a) -> (e, g.a)
forward 0 (x) -> (y)
  run fa
  run fb
end
backward 0 (t) -> ()
  run bb
  run ba
end
update
end
)");
  StepProgram plan = plain;
  run_pipeline(plan, PassRegistry::with_builtins(), {"zero3_compile"});
  const auto all = next_best(plain, plan, planned_for(costs).environment);
  EXPECT_EQ(about(all, "a", "kept whole"), about(all, "b", "kept whole"));
  EXPECT_EQ(about(all, "a", "on the host")->objects.size(), 2u);
}

TEST(NextBest, IsPartOfTheExplanation) {
  const UnitCost costs;
  const StepProgram plain = parse_program(kTwoLayers), plan = two_layers_zero3();
  const auto all = next_best(plain, plan, planned_for(costs).environment);
  const std::string text = explain(plan, simulate(plan, costs), all);
  EXPECT_NE(text.find("  else: released and gathered again from forward 0 to backward 0; kept "
                      "whole instead: -512 ns, +0 B\n"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("\nelse f."), std::string::npos) << text;
  EXPECT_NE(text.find("\nelse: updates in step; in next_forward instead: "), std::string::npos);
}

TEST(NextBest, SaysWhatItLacks) {
  const UnitCost costs;
  const StepProgram plain = parse_program(kTwoLayers), plan = two_layers_zero3();
  EXPECT_EQ(error_of([&] { next_best(plain, plan, {}); }),
            "[report] next_best: other choices are compared by simulation, and there is no "
            "machine. Give it one.");
  StepProgram other = plain;
  other.add_value({"more", Bytes{1}, std::nullopt});
  EXPECT_TRUE(error_of([&] {
                next_best(other, plan, planned_for(costs).environment);
              }).starts_with("[report] next_best: the plan was not made from this program."));
}

}  // namespace
}  // namespace deepcompile::report_next_best_test
