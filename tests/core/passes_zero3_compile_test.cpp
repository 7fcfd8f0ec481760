// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "ir/text.h"
#include "ir/verifier.h"
#include "passes/pipeline.h"
#include "passes/zero3_compile.h"
#include "test_support.h"

namespace deepcompile::passes_zero3_compile_test {
namespace {

StepProgram run(const std::string& text, const std::string& pass = "zero3_compile") {
  StepProgram program = parse_program(text);
  run_pipeline(program, PassRegistry::with_builtins(), {pass});
  verify_plan(program);
  return program;
}

TEST(Zero3Compile, PlacesEverythingOfAStep) {
  const StepProgram program = run(replaced(kTwoLayers, "reduce=f32", "clip"));
  EXPECT_EQ(sections_text(program), R"(forward 0
  gather a
  wait a
  run f.a
  release a
  gather b
  wait b
  run f.b
  release b
backward 0
  gather b
  wait b
  run b.b
  release b
  reduce b (g.b)
  gather a
  wait a
  run b.a
  release a
  reduce a (g.a)
  accumulate b
  reduce norms (g.n1, g.n0)
  accumulate a
  accumulate norms
update
  norm
  update a
  update b
  update norms
  gather norms
  wait norms
)");
  ASSERT_EQ(program.reasons.size(), 3u);
  EXPECT_EQ(program.reasons[0].pass, "zero3_compile");
  EXPECT_EQ(program.reasons[0].object, "a");
  EXPECT_EQ(program.reasons[0].text,
            "kept sharded: 256 B a rank instead of 512 B, gathered 2 times a micro batch");
  EXPECT_EQ(program.reasons[2].object, "norms");
  EXPECT_EQ(program.reasons[2].text,
            "kept whole: 512 B a rank, gathered once a step, after its update");
}

TEST(Zero3Compile, GathersOnceForSeveralUsesAndReleasesAfterTheLast) {
  // tied is used by all three, in two places of one; frozen is gathered and not reduced.
  EXPECT_EQ(sections_text(run(R"(step s world=2
param tied f32 64
param frozen f32 64 frozen
value x 4B
value y 4B
value z 4B
region a code=0 (x, tied) -> (y)
region b code=0 (y, frozen, tied, tied) -> (z)
region c code=0 (z, tied) -> ()
inference 0 (x) -> ()
  run a
  run b
  run c
end
)")),
            R"(inference 0
  gather tied
  wait tied
  run a
  gather frozen
  wait frozen
  run b
  release frozen
  run c
  release tied
)");
}

TEST(Zero3Compile, ReducesATiedGradientAfterItsLastPart) {
  const std::string text = R"(step s world=2
param tied f32 64
param p f32 64
param q f32 64
value t 4B
value g.t0 256B grad=tied
value g.t1 256B grad=tied
value g.p 256B grad=p
value g.q 256B grad=q
region a code=0 (t) -> (g.t0)
region b code=0 (t) -> (g.q, g.p)
region c code=0 (t) -> (g.t1)
forward 0 () -> ()
end
backward 0 (t) -> ()
  run a
  run b
  run c
end
)";
  // Parameters that one run completes go in id order; two are in flight at most.
  EXPECT_EQ(sections_text(run(text)), R"(forward 0
backward 0
  run a
  run b
  reduce p (g.p)
  reduce q (g.q)
  run c
  accumulate p
  reduce tied (g.t0, g.t1)
  accumulate q
  accumulate tied
)");
  const std::string all = replaced(replaced(replaced(text, "tied f32 64", "tied f32 64 replicated"),
                                            "p f32 64", "p f32 64 replicated"),
                                   "q f32 64", "q f32 64 replicated");
  EXPECT_EQ(sections_text(run(all, "zero0_compile")), sections_text(run(text)));
}

TEST(Zero3Compile, GathersAllOfARunBeforeItWaits) {
  EXPECT_EQ(sections_text(run(R"(step s world=2
param p f32 64
param q f32 64
param small f32 64 whole
region a code=0 (q, small, p) -> ()
inference 0 () -> ()
  run a
end
)")),
            R"(inference 0
  gather q
  gather p
  wait q
  wait p
  run a
  release q
  release p
)");
}

TEST(Zero3Compile, RefusesAProgramThatHasBeenThroughAPass) {
  EXPECT_EQ(error_of([] {
              StepProgram program = two_layers_zero3();
              run_pipeline(program, PassRegistry::with_builtins(), {"zero3_compile"});
            }),
            "[passes] zero3_compile: conflicts with gathers_placed, which the program already has. "
            "Start from the unoptimised program.");
  EXPECT_EQ(error_of([] {
              StepProgram program = parse_program(
                  "step s\nparam p f32 1 frozen whole\nupdate\n  gather p\n  wait p\nend\n");
              run_pipeline(program, PassRegistry::with_builtins(), {"zero3_compile"});
            }),
            "[passes] zero3_compile: update already holds `gather p`, and this pass places "
            "everything but runs itself. Start from the unoptimised program.");
}

TEST(Zero0Compile, PlacesReductionsAndUpdates) {
  std::string text = replaced(kTwoLayers, "f32 128", "f32 128 replicated");
  text = replaced(text, "64 whole", "64 replicated");
  const StepProgram program = run(text, "zero0_compile");
  EXPECT_EQ(sections_text(program), R"(forward 0
  run f.a
  run f.b
backward 0
  run b.b
  reduce b (g.b)
  run b.a
  reduce a (g.a)
  accumulate b
  reduce norms (g.n1, g.n0)
  accumulate a
  accumulate norms
update
  update a
  update b
  update norms
)");
  ASSERT_EQ(program.reasons.size(), 1u);
  EXPECT_EQ(program.reasons[0].text,
            "every parameter is on every rank: no gathers, 3 reductions a micro batch");
}

TEST(Zero0Compile, RefusesParametersThatAreNotReplicated) {
  EXPECT_EQ(error_of([] { run(kTwoLayers, "zero0_compile"); }),
            "[passes] zero0_compile: parameter a is placed sharded, and stage 0 keeps every "
            "parameter replicated. Place it `replicated`, or use zero3_compile.");
}

}  // namespace
}  // namespace deepcompile::passes_zero3_compile_test
