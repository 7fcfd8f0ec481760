// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "ir/text.h"
#include "ir/verifier.h"
#include "passes/zero1_compile.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"

namespace deepcompile::passes_zero1_compile_test {
namespace {

StepProgram two_layers_whole(const std::string& header = "") {
  StepProgram program = parse_program(kTwoLayers);
  for (Param& param : program.params) param.placement = Placement::kWhole;
  program.boundary = header == "boundary";
  program.clip = header == "clip";
  return program;
}

StepProgram compiled(StepProgram program) {
  run_pipeline(program, PassRegistry::with_builtins(), {"zero1_compile"});
  return program;
}

TEST(Zero1Compile, ReducesAndGathersBehindEachUpdate) {
  const StepProgram program = compiled(two_layers_whole());
  EXPECT_EQ(sections_text(program),
            "forward 0\n  run f.a\n  run f.b\n"
            "backward 0\n  run b.b\n  reduce b (g.b)\n  run b.a\n  reduce a (g.a)\n"
            "  accumulate b\n  reduce norms (g.n1, g.n0)\n  accumulate a\n  accumulate norms\n"
            "update\n  update a\n  gather a\n  update b\n  gather b\n  update norms\n"
            "  gather norms\n  wait a\n  wait b\n  wait norms\n");
  EXPECT_EQ(reasons_for(program, "zero1_compile", "a"),
            std::vector<std::string>{"kept whole: 512 B a rank, gathered once a step, after its "
                                     "update; optimizer states sharded over 2 ranks"});
  EXPECT_EQ(reasons_for(program, "zero1_compile", ""),
            std::vector<std::string>{"3 reductions a micro batch, no gathers in forward and "
                                     "backward"});
}

TEST(Zero1Compile, NormComesFirst) {
  const std::string text = sections_text(compiled(two_layers_whole("clip")));
  EXPECT_NE(text.find("update\n  norm\n  update a\n"), std::string::npos) << text;
}

// The stage is the program's: the instructions are the same.
TEST(Zero1Compile, StagesDifferInTheHeaderAlone) {
  StepProgram one = two_layers_whole("boundary");
  one.accumulation = 4;
  const StepProgram first = compiled(one);
  EXPECT_EQ(sections_text(first), sections_text(compiled(two_layers_whole())));
  EXPECT_TRUE(first.boundary);
  EXPECT_EQ(reasons_for(first, "zero1_compile", ""),
            std::vector<std::string>{"3 reductions in the last micro batch alone (stage 1): the "
                                     "others add up whole gradients on their rank, no gathers in "
                                     "forward and backward"});
}

TEST(Zero1Compile, RefusesOtherPlacements) {
  StepProgram sharded = parse_program(kTwoLayers);
  EXPECT_EQ(error_of([&] { compiled(sharded); }),
            "[passes] zero1_compile: parameter a is placed sharded, and stages 1 and 2 keep every "
            "parameter whole. Use stage 3 (zero3_compile), or place it `whole`.");
  for (Param& param : sharded.params) param.placement = Placement::kReplicated;
  EXPECT_EQ(error_of([&] { compiled(sharded); }),
            "[passes] zero1_compile: parameter a is placed replicated, and stages 1 and 2 keep "
            "every parameter whole. Use stage 0 (zero0_compile), or place it `whole`.");
}

TEST(Zero1Compile, MakesValidProgramsOfRandomOnes) {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    StepProgram program = random_program(seed);
    for (Param& param : program.params) param.placement = Placement::kWhole;
    program.boundary = seed % 2 == 0;
    const StepProgram once = compiled(program);
    EXPECT_EQ(print(once), print(compiled(program))) << seed;
    verify_plan(once);
    for (const Section& section : once.sections) {
      if (section.kind == SectionKind::kUpdate) continue;
      for (const Instr& instr : section.instrs) EXPECT_NE(instr.op, Op::kGather) << seed;
    }
  }
}

}  // namespace
}  // namespace deepcompile::passes_zero1_compile_test
