// SPDX-License-Identifier: Apache-2.0
// Copies take 1 ns a byte on the machine below, or as many bytes a ns as said.
#include <gtest/gtest.h>

#include <ctime>
#include <iostream>

#include "analysis/memory_timeline.h"
#include "ir/text.h"
#include "ir/verifier.h"
#include "layered_program.h"
#include "passes/offload_activation.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::passes_offload_activation_test {
namespace {

UnitCost host_cost(int64_t rate = 1) {
  UnitCost costs;
  costs.host_rate = rate;
  return costs;
}

StepProgram layers(int count, int64_t unit = 1024) {
  StepProgram program = parse_program(layered_program({.layers = count, .unit = unit}));
  run_pipeline(program, PassRegistry::with_builtins(), {"zero3_compile"});
  return program;
}

StepProgram named(StepProgram program, const std::vector<std::string>& values,
                  const Estimator* costs) {
  std::vector<ValueId> ids;
  for (const std::string& each : values) ids.push_back(*program.find_value(each));
  PipelineOptions options;
  options.environment.estimator = costs;
  const OffloadActivation pass({.values = ids});
  run_pipeline(program, {&pass}, options);
  return program;
}

StepProgram by_budget(StepProgram program, Bytes budget, const Estimator* costs,
                      Bytes smallest = Bytes{1}) {
  PipelineOptions options;
  options.environment.estimator = costs;
  options.environment.memory_budget = budget;
  const OffloadActivation pass({.smallest = smallest});
  run_pipeline(program, {&pass}, options);
  return program;
}

// Runs and value moves.
std::string moves(const StepProgram& program, SectionKind kind) {
  std::string out;
  for (const Instr& each : program.sections[index(*program.find_section(kind, 0))].instrs) {
    const bool value = traits(each.op).takes_values && each.op != Op::kReduce;
    if (each.op == Op::kRun || value) out += print(program, each) + "; ";
  }
  return out;
}

std::string away(const StepProgram& program) {
  std::string out;
  for (const Section& section : program.sections) {
    for (const Instr& instr : section.instrs) {
      if (instr.op != Op::kOffload) continue;
      for (ValueId id : instr.values) out += (out.empty() ? "" : " ") + program.value(id).name;
    }
  }
  return out;
}

TEST(OffloadActivation, CopiesBesideCompute) {
  const UnitCost costs = host_cost(128);  // c.0: 2 KiB in 16 ns
  const StepProgram program = named(layers(2), {"c.0"}, &costs);
  // Done 16 ns after f.0.1: beside f.0.2, which takes 20. In again: b.1.0 takes 60, and the
  // accumulation of v.1 follows it.
  EXPECT_EQ(moves(program, SectionKind::kForward),
            "run emb; run f.0.0; run f.0.1; offload (c.0); run f.0.2; evict (c.0); run f.1.0; "
            "run f.1.1; run f.1.2; run head; ");
  EXPECT_EQ(moves(program, SectionKind::kBackward),
            "run b.head; run b.1.2; run b.1.1; reload (c.0); run b.1.0; await (c.0); run b.0.2; "
            "run b.0.1; run b.0.0; run b.emb; ");
  EXPECT_EQ(reasons_for(program, "offload_activation", "f.0.1"),
            std::vector<std::string>{"c.0 on the host until the backward: 2.00 KiB less, 16 ns "
                                     "out and 16 ns in, beside compute"});
}

TEST(OffloadActivation, SlowCopiesWaitAtTheForwardsEnd) {
  const UnitCost costs = host_cost(1);
  const StepProgram program = named(layers(2), {"c.0"}, &costs);
  const std::string forward = moves(program, SectionKind::kForward);
  EXPECT_NE(forward.find("run head; evict (c.0); "), std::string::npos) << forward;
  EXPECT_EQ(moves(program, SectionKind::kBackward).find("reload (c.0); run b.head"), 0u);
  const auto reasons = reasons_for(program, "offload_activation", "f.0.1");
  ASSERT_EQ(reasons.size(), 1u);
  EXPECT_NE(reasons[0].find("; compute may wait "), std::string::npos) << reasons[0];
}

TEST(OffloadActivation, ValuesOfOneRegionLeaveTogetherAndComeWhenNeeded) {
  StepProgram program = parse_program(R"(
step one world=1
param w f32 16 whole
value x 4B
value a 8KiB
value b 8KiB
value y 4B
value t 4B
value d 4B
value g 64B grad=w
region f1 time=10ns (x) -> (a, b)
region f2 time=100us (a, w) -> (y)
region b2 time=100us (t, b) -> (d)
region b1 time=100us (d, a, w) -> (g)
forward 0 (x) -> (y)
  run f1
  run f2
end
backward 0 (t) -> ()
  run b2
  run b1
  reduce w (g)
  accumulate w
end
)");
  const UnitCost costs = host_cost(1);
  program = named(program, {"a", "b"}, &costs);
  EXPECT_EQ(moves(program, SectionKind::kForward),
            "run f1; offload (a, b); run f2; evict (a, b); ");
  EXPECT_EQ(moves(program, SectionKind::kBackward),
            "reload (b); reload (a); await (b); run b2; await (a); run b1; ");
}

// What f2 does not read leaves before it, if both do not have the room.
TEST(OffloadActivation, WhatIsNotUsedAnyMoreGoesFirstWhereMemoryIsShort) {
  const StepProgram before = parse_program(R"(
step one world=1
param w f32 16 whole
value x 4B
value a 8KiB
value b 8KiB
value c 8KiB
value y 4B
value t 4B
value d 4B
value g 64B grad=w
region f1 time=10ns (x) -> (a, b)
region f2 time=100us (a, w) -> (c)
region f3 time=100us (c) -> (y)
region b2 time=100us (t, b) -> (d)
region b1 time=100us (d, a, w) -> (g)
forward 0 (x) -> (y)
  run f1
  run f2
  run f3
end
backward 0 (t) -> ()
  run b2
  run b1
  reduce w (g)
  accumulate w
end
)");
  const UnitCost costs = host_cost(1);
  const auto forward = [&](Bytes budget) {
    StepProgram program = before;
    const OffloadActivation pass(
        {.values = {{*program.find_value("a"), *program.find_value("b")}}});
    run_pipeline(program, {&pass}, planned_for(costs, budget));
    return moves(program, SectionKind::kForward);
  };
  EXPECT_EQ(forward(Bytes{30 << 10}), "run f1; offload (a, b); run f2; evict (a, b); run f3; ");
  EXPECT_EQ(forward(Bytes{20 << 10}),
            "run f1; offload (b); offload (a); evict (b); run f2; evict (a); run f3; ");
}

TEST(OffloadActivation, TakesWhatWaitsLongestAndOnlyWhatIsNeeded) {
  const UnitCost costs = host_cost(1024);
  const StepProgram before = layers(6);
  const Bytes peak = memory_timeline(before).peak;
  EXPECT_EQ(away(by_budget(before, peak, &costs)), "");
  EXPECT_EQ(away(by_budget(before, peak - Bytes{1}, &costs)), "h.0");
  const StepProgram more = by_budget(before, peak - Bytes{5 * 1024}, &costs);
  EXPECT_EQ(away(more), "h.0 q.0");
  EXPECT_LE(memory_timeline(more).peak, peak - Bytes{5 * 1024});
  EXPECT_EQ(away(by_budget(before, peak - Bytes{1}, &costs, Bytes{4096})), "q.0");
}

TEST(OffloadActivation, LeavesTheCallersAndSmallValuesAlone) {
  const StepProgram before = layers(3);
  StepProgram program = before;
  PipelineOptions options;
  options.environment.memory_budget = Bytes{1};
  run_pipeline(program, PassRegistry::with_builtins(), {"offload_activation"}, options);
  EXPECT_EQ(away(program), "");
  const UnitCost costs;
  EXPECT_EQ(error_of([&] { named(before, {"ids"}, &costs); }),
            "[passes] offload_activation: value ids cannot wait on the host: only what a "
            "forward's region makes and its backward reads can, unless the caller has it too, it "
            "is made again, or another pass moves it. Leave it out.");
  EXPECT_NE(error_of([&] { named(before, {"d.1"}, &costs); }), "no error");
}

TEST(OffloadActivation, GoesWithRecomputation) {
  const UnitCost costs = host_cost(1024);
  const StepProgram before = layers(8);
  const Bytes peak = memory_timeline(before).peak;
  StepProgram program = before;
  PipelineOptions options = planned_for(costs, peak - Bytes{20 * 1024});
  options.environment.simulator = nullptr;
  run_pipeline(program, PassRegistry::with_builtins(), {"rematerialize"}, options);
  options.environment.memory_budget = memory_timeline(program).peak - Bytes{1024};
  const OffloadActivation pass({.smallest = Bytes{1}});
  run_pipeline(program, {&pass}, options);
  EXPECT_NE(away(program), "");
  EXPECT_LE(memory_timeline(program).peak, *options.environment.memory_budget);
}

TEST(OffloadActivation, IsRightOnRandomPrograms) {
  int lower = 0;
  for (uint32_t seed = 0; seed < 120; ++seed) {
    const UnitCost costs = host_cost(1 << (seed % 12));
    StepProgram before = random_program(seed);
    run_pipeline(before, PassRegistry::with_builtins(), {"zero3_compile"});
    if (seed % 2 == 1) {
      PipelineOptions options;
      options.environment.memory_budget = Bytes{1};
      run_pipeline(before, PassRegistry::with_builtins(), {"rematerialize"}, options);
    }
    const MemoryTimeline timeline = memory_timeline(before);
    for (int part = 1; part <= 3; ++part) {
      const Bytes saved = timeline.peak - timeline.base;
      const Bytes budget = timeline.peak - Bytes{saved.value * part / 8};
      const StepProgram program = by_budget(before, budget, &costs);
      EXPECT_EQ(print(program), print(by_budget(before, budget, &costs))) << seed;
      const Bytes peak = memory_timeline(program).peak;
      EXPECT_LE(peak, timeline.peak) << seed;
      if (peak < timeline.peak) ++lower;
      const std::string said = reasons_for(program, "offload_activation", "").at(0);
      EXPECT_EQ(peak > budget, said.find("lower it") != std::string::npos) << seed << said;
    }
  }
  EXPECT_GT(lower, 20);
}

// On a real machine's numbers, where copies fit beside compute.
TEST(OffloadActivation, CostsLittleWhereCopiesFitBesideCompute) {
  const MachineCosts costs(
      load_machine(DEEPCOMPILE_SOURCE_DIR "/python/deepcompile/machines/4xh200.json"));
  StepProgram before = layers(16, 1 << 24);
  for (Region& region : before.regions) region.time = *region.time * 1'000'000;
  PipelineOptions options = planned_for(costs, memory_timeline(before).peak - Bytes{1 << 29});
  StepProgram program = before;
  run_pipeline(program, PassRegistry::with_builtins(), {"offload_activation"}, options);
  const SimResult result = simulate(program, costs);
  EXPECT_LE(result.peak, *options.environment.memory_budget);
  EXPECT_LE(result.time.value, simulate(before, costs).time.value * 101 / 100);
}

TEST(OffloadActivation, EightyLayersTakeMilliseconds) {
  const StepProgram before = layers(80, 1 << 24);
  const MemoryTimeline timeline = memory_timeline(before);
  for (int part : {1, 4, 7}) {
    const Bytes budget = timeline.peak - Bytes{(timeline.peak - timeline.base).value * part / 8};
    const std::clock_t start = std::clock();
    const StepProgram program = by_budget(before, budget, nullptr);
    std::cout << part << "/8 less: " << 1000.0 * (std::clock() - start) / CLOCKS_PER_SEC
              << " ms, verification included; " << reasons_for(program, "offload_activation", "")[0]
              << "\n";
  }
}

}  // namespace
}  // namespace deepcompile::passes_offload_activation_test
