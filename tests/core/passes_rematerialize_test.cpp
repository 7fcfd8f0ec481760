// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <ctime>
#include <iostream>

#include "analysis/memory_timeline.h"
#include "ir/text.h"
#include "ir/verifier.h"
#include "layered_program.h"
#include "passes/recomputation.h"
#include "passes/rematerialize.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::passes_rematerialize_test {
namespace {

StepProgram compiled(const std::string& text, const std::string& stage = "zero3_compile") {
  StepProgram program = parse_program(text);
  run_pipeline(program, PassRegistry::with_builtins(), {stage});
  return program;
}

StepProgram again(StepProgram program, const std::vector<std::string>& regions,
                  const PipelineOptions& options = {}) {
  std::vector<RegionId> ids;
  for (const std::string& each : regions) ids.push_back(*program.find_region(each));
  const Rematerialize pass({.recompute = ids});
  run_pipeline(program, {&pass}, options);
  return program;
}

StepProgram by_budget(StepProgram program, Bytes budget) {
  PipelineOptions options;
  options.environment.memory_budget = budget;
  run_pipeline(program, PassRegistry::with_builtins(), {"rematerialize"}, options);
  return program;
}

std::string section_text(const StepProgram& program, SectionKind kind) {
  std::string out;
  for (const Instr& each : program.sections[index(*program.find_section(kind, 0))].instrs) {
    out += print(program, each) + "; ";
  }
  return out;
}

// Names of the regions that the backward of graph 0 runs again, in order.
std::string run_again(const StepProgram& program) {
  std::vector<bool> forward(program.regions.size(), false);
  std::string out;
  for (const Section& section : program.sections) {
    for (const Instr& instr : section.instrs) {
      if (instr.op != Op::kRun) continue;
      if (forward[index(*instr.region)]) {
        out += (out.empty() ? "" : " ") + program.region(*instr.region).name;
      }
      if (section.kind == SectionKind::kForward) forward[index(*instr.region)] = true;
    }
  }
  return out;
}

TEST(Rematerialize, RunsARegionAgainJustBeforeItsOutputsAreUsed) {
  const StepProgram program = again(two_layers_zero3(), {"f.a"});
  EXPECT_EQ(sections_text(program),
            "forward 0\n  gather a\n  wait a\n  run f.a\n  release a\n  gather b\n  wait b\n"
            "  run f.b\n  release b\n"
            "backward 0\n  gather b\n  wait b\n  gather a\n  wait a\n  run f.a\n  release a\n"
            "  run b.b\n  release b\n  reduce b (g.b)\n  gather a\n  wait a\n  run b.a\n"
            "  release a\n  reduce a (g.a)\n  accumulate b\n  reduce norms (g.n1, g.n0)\n"
            "  accumulate a\n  accumulate norms\n"
            "update\n  update a\n  update b\n  update norms\n  gather norms\n  wait norms\n");
  EXPECT_EQ(reasons_for(program, "rematerialize", "f.a"),
            std::vector<std::string>{"run again in backward 0, before `run b.b`: 1.00 KiB less "
                                     "saved for 10 ns of compute"});
}

TEST(Rematerialize, ALayerRunsAgainAsAChainFromItsInput) {
  const StepProgram program =
      again(compiled(layered_program({.layers = 2})), {"f.1.0", "f.1.1", "f.1.2"});
  // h.1 is kept, q.1 and c.1 are made again; nothing saved comes of f.1.2. w.1 is gathered
  // once, for the chain and the backward.
  EXPECT_EQ(run_again(program), "f.1.0 f.1.1");
  const std::string backward = section_text(program, SectionKind::kBackward);
  EXPECT_EQ(backward.find("run b.head; gather v.1; wait v.1; gather w.1; wait w.1; run f.1.0; "
                          "run f.1.1; run b.1.2; release v.1; reduce v.1 (g.v.1); run b.1.1; "
                          "run b.1.0; release w.1; reduce w.1 (g.w.1); "),
            0u)
      << backward;
}

TEST(Rematerialize, EveryLayerAtOnceIsFullCheckpointing) {
  const StepProgram before = compiled(layered_program({.layers = 3}));
  std::vector<std::string> all;
  for (int i = 0; i < 3; ++i) {
    for (int k = 0; k < 3; ++k) all.push_back("f." + std::to_string(i) + "." + std::to_string(k));
  }
  const StepProgram program = again(before, all);
  // Each layer from its own input: h.1 and h.2 stay, so no chain reaches into another layer.
  EXPECT_EQ(run_again(program), "f.2.0 f.2.1 f.1.0 f.1.1 f.0.0 f.0.1");
  const auto saved = [](const StepProgram& of) {
    const MemoryTimeline timeline = memory_timeline(of);
    for (const MemoryAt& at : timeline.points) {
      if (of.sections[at.section].kind == SectionKind::kBackward) return at.during;
    }
    return Bytes{0};
  };
  // q and c, six units, of three layers.
  EXPECT_EQ(saved(before) - saved(program), Bytes{3 * 6 * 1024});
}

TEST(Rematerialize, ComputeOnlyProgramsGetRunsAlone) {
  const StepProgram program = again(parse_program(kTwoLayers), {"f.a"});
  EXPECT_EQ(sections_text(program),
            "forward 0\n  run f.a\n  run f.b\nbackward 0\n  run f.a\n  run b.b\n  run b.a\n"
            "update\n");
}

TEST(Rematerialize, NeedsNoGathersOfWholeParameters) {
  const StepProgram program = again(
      compiled(layered_program({.layers = 2, .placement = "whole"}), "zero1_compile"), {"f.0.0"});
  EXPECT_EQ(run_again(program), "f.0.0");
  EXPECT_EQ(section_text(program, SectionKind::kBackward).find("gather"), std::string::npos);
}

TEST(Rematerialize, WithoutABudgetNothingChanges) {
  StepProgram program = two_layers_zero3();
  const std::string before = sections_text(program);
  run_pipeline(program, PassRegistry::with_builtins(), {"rematerialize"});
  EXPECT_EQ(sections_text(program), before);
  EXPECT_EQ(reasons_for(program, "rematerialize", ""),
            std::vector<std::string>{"nothing is recomputed: no memory budget is given"});
  EXPECT_EQ(sections_text(by_budget(two_layers_zero3(), Bytes{1 << 20})), before);
}

TEST(Rematerialize, ChoosesTheCheapestBytesFirst) {
  const StepProgram before = compiled(layered_program({.layers = 6}));
  const Bytes peak = memory_timeline(before).peak;
  // c, two units for 5 ns, is cheaper than q, four units for 30.
  const StepProgram little = by_budget(before, peak - Bytes{1});
  EXPECT_EQ(run_again(little), "f.0.1");
  EXPECT_LT(memory_timeline(little).peak, peak);
  const StepProgram much = by_budget(before, peak - Bytes{12 * 1024});
  EXPECT_LE(memory_timeline(much).peak, peak - Bytes{12 * 1024}) << sections_text(much);
  EXPECT_NE(run_again(much).find("f.0.0"), std::string::npos) << run_again(much);
}

TEST(Rematerialize, MarksComeFirst) {
  std::string text = layered_program({.layers = 4});
  text =
      replaced(text, "region f.1.0 code=2 time=30ns", "region f.1.0 code=2 time=30ns checkpoint");
  const StepProgram before = compiled(text);
  const StepProgram program = by_budget(before, memory_timeline(before).peak - Bytes{1});
  EXPECT_EQ(run_again(program), "f.1.0");
}

TEST(Rematerialize, SaysWhenTheBudgetIsOutOfReach) {
  const StepProgram before = compiled(layered_program({.layers = 4}));
  const StepProgram program = by_budget(before, Bytes{1});
  EXPECT_LT(memory_timeline(program).peak, memory_timeline(before).peak);
  const auto reasons = reasons_for(program, "rematerialize", "");
  ASSERT_EQ(reasons.size(), 1u);
  EXPECT_NE(reasons[0].find("nothing more that is recomputed lowers it"), std::string::npos)
      << reasons[0];
}

TEST(Rematerialize, LeavesAloneWhatRunsOnce) {
  const std::string layers =
      replaced(layered_program({.layers = 4}), "region f.0.1 code=3", "region f.0.1 code=3 once");
  const std::string chosen = run_again(by_budget(compiled(layers), Bytes{1}));
  EXPECT_EQ(chosen.find("f.0.1"), std::string::npos) << chosen;
  EXPECT_NE(chosen.find("f.1.1"), std::string::npos) << chosen;
  std::string text = replaced(kTwoLayers, "region f.b code=0", "region f.b code=0 once");
  EXPECT_EQ(error_of([&] { again(parse_program(text), {"f.b"}); }),
            "[passes] rematerialize: region f.b cannot run again: it draws random numbers, writes "
            "to what it reads, reads what another region may write to, or runs twice already. "
            "Leave it out.");
  EXPECT_EQ(error_of([&] { again(parse_program(text), {"b.b"}); }),
            "[passes] rematerialize: region b.b is in no forward that has a backward. Leave it "
            "out.");
  // f.b may write to x, which f.a reads.
  text = replaced(text, "(h, b, norms[1])", "(h, b, norms[1], x)");
  EXPECT_EQ(error_of([&] { again(parse_program(text), {"f.a"}); }).find("[passes] rematerialize"),
            0u);
}

// h would be made again after b.b, which may write to x, which f.a reads.
TEST(Rematerialize, LeavesAloneWhatReadsAnInputThatTheBackwardWritesTo) {
  std::string text = replaced(kTwoLayers, "(t.loss, s, h, b)", "(t.loss, s, x, b)");
  text = replaced(text, "(d, x, a)", "(d, h, a)");
  text = replaced(replaced(text, "value h 1KiB", "value h 64KiB"), "b.b code=1", "b.b code=1 once");
  const StepProgram before = compiled(text);
  EXPECT_EQ(error_of([&] { again(before, {"f.a"}); }).find("[passes] rematerialize: region f.a"),
            0u);
  EXPECT_EQ(run_again(by_budget(before, Bytes{1})).find("f.a"), std::string::npos);
  const UnitCost costs;
  for (const int64_t less : {0, 1, 60'000}) {
    const Bytes budget = memory_timeline(before).peak - Bytes{less};
    const std::string error = error_of([&] {
      StepProgram plan = parse_program(text);
      run_pipeline(plan, PassRegistry::with_builtins(), {"auto"}, planned_for(costs, budget));
    });
    EXPECT_EQ(error.find("is on the other side"), std::string::npos) << error;
  }
}

TEST(Rematerialize, IsRightOnRandomPrograms) {
  int lower = 0;
  for (uint32_t seed = 0; seed < 120; ++seed) {
    StepProgram before = random_program(seed);
    run_pipeline(before, PassRegistry::with_builtins(), {"zero3_compile"});
    const MemoryTimeline timeline = memory_timeline(before);
    const Bytes saved = timeline.peak - timeline.base;
    for (int part = 1; part <= 4; ++part) {
      const Bytes budget = timeline.peak - Bytes{saved.value * part / 8};
      const StepProgram program = by_budget(before, budget);
      EXPECT_EQ(print(program), print(by_budget(before, budget))) << seed;
      EXPECT_LE(memory_timeline(program).peak, timeline.peak) << seed;
      if (memory_timeline(program).peak < timeline.peak) ++lower;
      if (memory_timeline(program).peak > budget) {
        const auto reasons = reasons_for(program, "rematerialize", "");
        EXPECT_NE(reasons.at(0).find("lowers it"), std::string::npos) << seed;
      }
    }
    // Everything that may run again, at once: still a valid program.
    std::vector<std::string> all;
    for (const RecomputableGraph& graph : recomputable_graphs(before)) {
      for (size_t i = 0; i < graph.runs.size(); ++i) {
        if (graph.allowed[i]) all.push_back(before.region(graph.runs[i]).name);
      }
    }
    again(before, all);
  }
  EXPECT_GT(lower, 20);
}

TEST(Rematerialize, EightyLayersTakeMilliseconds) {
  const StepProgram before = compiled(layered_program({.layers = 80, .unit = 1 << 24}));
  const MemoryTimeline timeline = memory_timeline(before);
  for (int part : {1, 4, 7}) {
    const Bytes budget = timeline.peak - Bytes{(timeline.peak - timeline.base).value * part / 8};
    const std::clock_t start = std::clock();
    const StepProgram program = by_budget(before, budget);
    std::cout << part << "/8 less: " << 1000.0 * (std::clock() - start) / CLOCKS_PER_SEC
              << " ms, verification included; " << reasons_for(program, "rematerialize", "")[0]
              << "\n";
  }
}

}  // namespace
}  // namespace deepcompile::passes_rematerialize_test
