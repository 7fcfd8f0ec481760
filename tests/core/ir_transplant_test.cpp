// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "ir/merge_steps.h"
#include "ir/split_step.h"
#include "ir/text.h"
#include "ir/transplant.h"
#include "ir/verifier.h"
#include "passes/pipeline.h"
#include "plan/plan.h"
#include "test_support.h"

namespace deepcompile::ir_transplant_test {
namespace {

// A chain x -> a -> y: forward f, backward b with the saved value s.
std::string graph(const std::string& name, const std::string& bytes) {
  return "step " + name + " world=2 accumulation=1 reduce=f32\n" + R"(
param w f32 128
value x 4B
value s )" +
         bytes + R"(
value y 4B
value t 4B
value g.w 512B grad=w
region f code=0 (x, w) -> (s, y)
region b code=1 (t, s, w) -> (g.w)
forward 3 (x) -> (y)
  run f
end
backward 3 (t) -> ()
  run b
end
)";
}

const char kUpdate[] = R"(step up world=2 accumulation=1 reduce=f32
param w f32 128
param v f32 64 whole
update
end
)";

StepProgram planned(const StepProgram& merged) {
  StepProgram out = merged;
  run_pipeline(out, PassRegistry::with_builtins(), {"zero3_compile"});
  return out;
}

std::vector<StepProgram> parts() {
  return {parse_program(graph("g", "64B")), parse_program(graph("h", "128B"))};
}

TEST(SplitStep, GivesEachGraphItsOwnInstructions) {
  const StepProgram update = parse_program(kUpdate);
  const StepProgram merged = planned(merge_steps("step", parts(), update));
  const std::vector<StepProgram> split = split_step(merged, parts(), update);
  ASSERT_EQ(split.size(), 3u);
  for (size_t k = 0; k < 2; ++k) {
    // What the pass makes of one graph alone is what it makes of it in the step.
    EXPECT_EQ(sections_text(split[k]), sections_text(planned(parts()[k])));
    EXPECT_EQ(split[k].sections[0].graph, 3u);
    EXPECT_NO_THROW(freeze(split[k]));
  }
  EXPECT_EQ(sections_text(split[2]), sections_text(planned(update)));
}

TEST(SplitStep, AddsParametersThatInstructionsBringAlong) {
  const StepProgram update = parse_program(kUpdate);
  StepProgram merged = planned(merge_steps("step", parts(), update));
  const ParamId v = *merged.find_param("v");
  auto& forward = merged.sections[0].instrs;
  forward.insert(forward.begin(), Instr{Op::kUpdate, v, {}, {}});
  const std::vector<StepProgram> split = split_step(merged, parts(), update);
  ASSERT_TRUE(split[0].find_param("v"));
  EXPECT_EQ(print(split[0], split[0].sections[0].instrs[0]), "update v");
}

TEST(SplitStep, RefusesOtherParts) {
  const StepProgram update = parse_program(kUpdate);
  const StepProgram merged = planned(merge_steps("step", parts(), update));
  const auto one = std::vector<StepProgram>{parts()[0]};
  EXPECT_NE(error_of([&] { split_step(merged, one, update); }).find("other values or regions"),
            std::string::npos);
}

TEST(Transplant, CarriesAPlanToOtherSizes) {
  const StepProgram agreed = planned(parts()[0]);
  const StepProgram plain = parts()[1];
  EXPECT_EQ(skeleton(agreed), skeleton(plain));
  EXPECT_EQ(structure(agreed), structure(plain));
  const StepProgram out = transplant(agreed, plain);
  EXPECT_EQ(sections_text(out), sections_text(agreed));
  EXPECT_EQ(out.values[1].bytes, Bytes{128});
  EXPECT_NO_THROW(freeze(out));
}

TEST(Transplant, LeavesOutWhatAnotherStructureCannotShare) {
  StepProgram agreed = planned(parts()[0]);
  auto& backward = agreed.sections[1].instrs;
  // gather w, wait w, then f again: x is kept, s and y are made anew.
  backward.insert(backward.begin() + 2, Instr{Op::kRun, {}, *agreed.find_region("f"), {}});
  ASSERT_NO_THROW(verify_plan(agreed));
  const StepProgram plain =
      parse_program(replaced(graph("h", "64B"), "(t, s, w) -> (g.w)", "(t, s, x, w) -> (g.w)"));
  EXPECT_EQ(skeleton(agreed), skeleton(plain));
  EXPECT_NE(structure(agreed), structure(plain));
  EXPECT_EQ(sections_text(transplant(agreed, plain)), sections_text(planned(plain)));
  EXPECT_EQ(sections_text(transplant(agreed, parts()[1])), sections_text(agreed));
}

TEST(Transplant, RefusesAnotherSkeleton) {
  const StepProgram agreed = planned(parts()[0]);
  const StepProgram other =
      parse_program(replaced(graph("h", "64B"), "(t, s, w) -> (g.w)", "(t, s) -> (g.w)"));
  EXPECT_NE(skeleton(agreed), skeleton(other));
  const std::string error = error_of([&] { transplant(agreed, other); });
  EXPECT_NE(error.find("backward 3 read other parameters"), std::string::npos) << error;
}

TEST(Transplant, CarriesAnUpdate) {
  const StepProgram update = parse_program(kUpdate);
  EXPECT_EQ(sections_text(transplant(planned(update), update)), sections_text(planned(update)));
}

}  // namespace
}  // namespace deepcompile::ir_transplant_test
