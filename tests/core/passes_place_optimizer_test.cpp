// SPDX-License-Identifier: Apache-2.0
// Where the optimizer runs. Times are those of unit_cost.h: a transfer takes 1
// ns a byte, an update 50 ns, an accumulation 10.
#include <gtest/gtest.h>

#include "ir/verifier.h"
#include "passes/place_optimizer.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::passes_place_optimizer_test {
namespace {

StepProgram placed(StepProgram program, PlaceOptimizerOptions pass,
                   const PipelineOptions& options = {}) {
  const PlaceOptimizer place(pass);
  run_pipeline(program, {&place}, options);
  return program;
}

std::string section_of(const StepProgram& program, const std::string& name) {
  const std::string text = sections_text(program);
  const size_t from = text.find(name + "\n") + name.size() + 1;
  size_t to = text.find('\n', from);
  while (to + 1 < text.size() && text[to + 1] == ' ') to = text.find('\n', to + 1);
  return text.substr(from, to + 1 - from);
}

TEST(PlaceOptimizer, NextForwardUpdatesAheadOfTheGather) {
  const StepProgram program =
      placed(two_layers_zero3(), {.place = Place::kNextForward, .ahead = 1});
  EXPECT_EQ(section_of(program, "forward 0"),
            "  update a\n  gather a\n  update norms\n  gather norms\n"
            "  update b\n  wait a\n  wait norms\n  run f.a\n  release a\n"
            "  gather b\n  wait b\n  run f.b\n  release b\n");
  EXPECT_EQ(section_of(program, "update"), "  defer a\n  defer b\n  defer norms\n");
  // Whole, and deferred: gathered by every section that uses it.
  const std::string backward = section_of(program, "backward 0");
  EXPECT_EQ(backward.find("gather norms"), std::string::npos);  // none of its runs reads it
  EXPECT_EQ(
      reasons_for(program, "place_optimizer", "b"),
      std::vector<std::string>{"updated in the next forward 0, 1 run ahead of its first use"});
}

TEST(PlaceOptimizer, AheadIsCountedInRuns) {
  const StepProgram none = placed(two_layers_zero3(), {.place = Place::kNextForward, .ahead = 0});
  EXPECT_NE(section_of(none, "forward 0").find("run f.a\n  release a\n  update b\n  gather b\n"),
            std::string::npos)
      << sections_text(none);
}

TEST(PlaceOptimizer, BackwardUpdatesOnceTheGradientIsThere) {
  const UnitCost costs;
  PipelineOptions options = planned_for(costs);
  options.environment.early_updates = true;
  const StepProgram program = placed(two_layers_zero3(), {.place = Place::kBackward}, options);
  EXPECT_NE(section_of(program, "backward 0").find("accumulate a\n  update a\n"),
            std::string::npos);
  EXPECT_NE(section_of(program, "backward 0").find("accumulate b\n  update b\n"),
            std::string::npos);
  // What is left for the update section finds nothing to do.
  EXPECT_EQ(section_of(program, "update"), section_of(two_layers_zero3(), "update"));
}

TEST(PlaceOptimizer, BackwardIsRefusedWhereItWouldBeWrong) {
  const UnitCost costs;
  PipelineOptions options = planned_for(costs);
  const std::string begin = "[passes] place_optimizer: cannot update in the backward: ";
  EXPECT_TRUE(error_of([&] {
                placed(two_layers_zero3(), {.place = Place::kBackward}, options);
              }).starts_with(begin + "the step may still be skipped"));
  options.environment.early_updates = true;
  StepProgram clipped = parse_program(replaced(kTwoLayers, "reduce=f32", "clip reduce=f32"));
  run_pipeline(clipped, PassRegistry::with_builtins(), {"zero3_compile"});
  EXPECT_EQ(error_of([&] { placed(clipped, {.place = Place::kBackward}, options); }),
            begin +
                "the step clips, and the norm comes after the backward. Choose step or "
                "next_forward.");
}

TEST(PlaceOptimizer, OffloadedStatesMoveWithTheirUpdate) {
  std::string text = print(two_layers_zero3());
  text = replaced(text, "  update b\n", "  reload_states b\n  update_b\n");
  text = replaced(text, "  update_b\n",
                  "  await_states b\n  update b\n  offload_states b\n  evict_states b\n");
  const StepProgram program =
      placed(parse_program(text), {.place = Place::kNextForward, .ahead = 1});
  EXPECT_EQ(section_of(program, "update"), "  defer a\n  defer b\n  defer norms\n");
  EXPECT_NE(section_of(program, "forward 0")
                .find("reload_states b\n  await_states b\n  update b\n  offload_states b\n"),
            std::string::npos)
      << sections_text(program);
  // With several micro batches they would move in each: b stays.
  const StepProgram two = placed(parse_program(replaced(text, "accumulation=1", "accumulation=2")),
                                 {.place = Place::kNextForward, .ahead = 1});
  EXPECT_EQ(section_of(two, "forward 0").find("update b"), std::string::npos);
  EXPECT_EQ(reasons_for(two, "place_optimizer", "b"),
            std::vector<std::string>{
                "updated in the update section: its states would move in each micro batch"});
}

// Compute-bound, with updates as long as gathers: in the forward they hide
// behind each other.
TEST(PlaceOptimizer, TakesTheFastest) {
  UnitCost costs;
  costs.update = Nanos{500};
  const StepProgram before = two_layers_zero3();
  const StepProgram program = placed(before, {}, planned_for(costs));
  EXPECT_LT(simulate(program, costs).time, simulate(before, costs).time);
  const std::string chosen = reasons_for(program, "place_optimizer", "").back();
  EXPECT_TRUE(chosen.starts_with("updates: next_forward")) << chosen;
  EXPECT_NE(chosen.find("simulated with prefetch: step "), std::string::npos) << chosen;
}

TEST(PlaceOptimizer, ChangesNothingWithoutAMachineOrAWholeStep) {
  const StepProgram before = two_layers_zero3();
  const StepProgram same = placed(before, {});
  EXPECT_EQ(sections_text(same), sections_text(before));
  EXPECT_EQ(reasons_for(same, "place_optimizer", "").back(),
            "unchanged: without a machine to simulate, the places cannot be compared");
}

TEST(PlaceOptimizer, RandomProgramsStayValid) {
  const UnitCost costs;
  PipelineOptions options = planned_for(costs);
  options.environment.early_updates = true;
  for (uint32_t seed = 0; seed < 150; ++seed) {
    StepProgram program = random_program(seed, {.replicated = seed % 4 == 0});
    run_pipeline(program, PassRegistry::with_builtins(),
                 {seed % 4 == 0 ? "zero0_compile" : "zero3_compile"});
    if (!facts_of(program).contains(Fact::kUpdatesPlaced)) continue;  // all frozen
    for (const int ahead : {0, 1, 3, 100}) {
      const StepProgram out = placed(program, {.place = Place::kNextForward, .ahead = ahead});
      ASSERT_EQ(error_of([&] { verify_plan(out); }), "no error") << seed;
    }
    if (program.clip) continue;
    const StepProgram early = placed(program, {.place = Place::kBackward}, options);
    ASSERT_EQ(error_of([&] { verify_plan(early); }), "no error") << seed;
  }
}

}  // namespace
}  // namespace deepcompile::passes_place_optimizer_test
