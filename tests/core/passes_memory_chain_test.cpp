// SPDX-License-Identifier: Apache-2.0
// The passes that trade memory for time or traffic, one after the other, on
// random steps: what each leaves is what the next can take.
#include <gtest/gtest.h>

#include "analysis/memory_timeline.h"
#include "ir/text.h"
#include "ir/verifier.h"
#include "layered_program.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::passes_memory_chain_test {
namespace {

const std::vector<std::string> kChain = {"rematerialize", "offload_activation",
                                         "offload_adam_states"};

void check_chain(const StepProgram& before, const std::vector<std::string>& names, Bytes budget) {
  UnitCost costs;
  costs.host_rate = 16;
  PipelineOptions options = planned_for(costs, budget);
  StepProgram program = before;
  run_pipeline(program, PassRegistry::with_builtins(), names, options);
  StepProgram same = before;
  run_pipeline(same, PassRegistry::with_builtins(), names, options);
  EXPECT_EQ(print(program), print(same));
  EXPECT_EQ(print(parse_program(print(program))), print(program));
  EXPECT_LE(memory_timeline(program).peak, memory_timeline(before).peak);
  EXPECT_GT(simulate(program, costs).time, Nanos{0});
}

TEST(MemoryChain, EachPassTakesWhatTheOneBeforeLeaves) {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    StepProgram before = random_program(seed);
    const bool whole = seed % 3 == 0;
    if (whole) {
      for (Param& param : before.params) param.placement = Placement::kWhole;
      before.boundary = seed % 2 == 0;
    }
    run_pipeline(before, PassRegistry::with_builtins(),
                 {whole ? "zero1_compile" : "zero3_compile"});
    if (!facts_of(before).contains(Fact::kUpdatesPlaced)) continue;
    const MemoryTimeline timeline = memory_timeline(before);
    for (int part : {1, 3, 6}) {
      check_chain(before, kChain, timeline.peak - Bytes{timeline.peak.value * part / 8});
    }
  }
}

// Updates that place_optimizer moved, before and after offload.
TEST(MemoryChain, UpdatesMayStandInForwards) {
  const PassRegistry registry = PassRegistry::with_builtins();
  if (registry.find("place_optimizer") == nullptr) GTEST_SKIP() << "no place_optimizer";
  for (const char* placement : {"", "whole"}) {
    StepProgram before = parse_program(layered_program({.layers = 4, .placement = placement}));
    run_pipeline(before, registry, {*placement ? "zero1_compile" : "zero3_compile"});
    const UnitCost costs;
    PipelineOptions roomy = planned_for(costs, Bytes{1 << 30});
    StepProgram placed = before;
    run_pipeline(placed, registry, {"place_optimizer"}, roomy);
    check_chain(placed, kChain, memory_timeline(placed).peak - Bytes{4096});
    const Bytes peak = memory_timeline(before).peak;
    StepProgram program = before;
    run_pipeline(program, registry, kChain, planned_for(costs, peak - Bytes{4096}));
    run_pipeline(program, registry, {"place_optimizer"}, roomy);
    verify_plan(program);
  }
}

}  // namespace
}  // namespace deepcompile::passes_memory_chain_test
