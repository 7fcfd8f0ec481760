// SPDX-License-Identifier: Apache-2.0
// On the machine of unit_cost.h the host link moves 1 byte a ns each way, an
// update takes 50 ns, an accumulation 10. States of a parameter of kTwoLayers
// are 512 B: two moments of 256 B.
#include <gtest/gtest.h>

#include <ctime>
#include <iostream>

#include "analysis/memory_timeline.h"
#include "ir/text.h"
#include "ir/verifier.h"
#include "layered_program.h"
#include "passes/offload_adam_states.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::passes_offload_adam_states_test {
namespace {

StepProgram moved(StepProgram program, const std::vector<std::string>& params, bool synchronous,
                  const Estimator* costs = nullptr, std::optional<Bytes> budget = std::nullopt) {
  OffloadAdamStatesOptions pass_options{.synchronous = synchronous};
  if (!params.empty()) pass_options.params.emplace();
  for (const std::string& each : params) {
    pass_options.params->push_back(*program.find_param(each));
  }
  PipelineOptions options;
  options.environment.estimator = costs;
  options.environment.memory_budget = budget;
  const OffloadAdamStates pass(pass_options);
  run_pipeline(program, {&pass}, options);
  return program;
}

std::string section_text(const StepProgram& program, SectionKind kind) {
  std::string out;
  for (const Instr& each : program.sections[index(*program.find_section(kind, 0))].instrs) {
    out += print(program, each) + "; ";
  }
  return out;
}

// Parameters whose states move, in the order of their updates.
std::string away(const StepProgram& program) {
  std::string out;
  for (const Section& section : program.sections) {
    for (const Instr& instr : section.instrs) {
      if (instr.op != Op::kAwaitStates) continue;
      out += (out.empty() ? "" : " ") + program.param(*instr.param).name;
    }
  }
  return out;
}

TEST(OffloadAdamStates, SyncCopiesAtEachUpdate) {
  const StepProgram program = moved(two_layers_zero3(), {"a", "norms"}, true);
  EXPECT_EQ(section_text(program, SectionKind::kUpdate),
            "reload_states a; await_states a; update a; offload_states a; evict_states a; "
            "update b; reload_states norms; await_states norms; update norms; "
            "offload_states norms; evict_states norms; gather norms; wait norms; ");
  EXPECT_EQ(section_text(program, SectionKind::kForward).find("states"), std::string::npos);
}

TEST(OffloadAdamStates, CopiesGoBesideComputeAcrossTheStepsEnd) {
  const UnitCost costs;
  const StepProgram program = moved(two_layers_zero3(), {"b"}, false, &costs);
  // Compute before update b: 10 + 10 in the forward, 20 + 20 and three accumulations in the
  // backward, update a: 140 ns. The copy in takes 512 ns: it starts with the backward. The copy
  // out has 50 ns beside update norms and is done after the next forward: 462 ns are left.
  EXPECT_EQ(section_text(program, SectionKind::kForward),
            "gather a; wait a; run f.a; release a; gather b; wait b; run f.b; release b; "
            "evict_states b; ");
  EXPECT_EQ(section_text(program, SectionKind::kBackward).find("reload_states b; gather b"), 0u);
  EXPECT_EQ(section_text(program, SectionKind::kUpdate),
            "update a; await_states b; update b; offload_states b; update norms; gather norms; "
            "wait norms; ");
  EXPECT_EQ(reasons_for(program, "offload_adam_states", "b"),
            std::vector<std::string>{"optimizer states on the host but for the update: 512 B "
                                     "less; 512 ns in (backward 0) and 512 ns out (forward 0 of "
                                     "the next step), beside compute"});
}

TEST(OffloadAdamStates, FastCopiesStayInTheUpdateSection) {
  UnitCost costs;
  costs.host_rate = 16;  // 32 ns
  const StepProgram program = moved(two_layers_zero3(), {"b"}, false, &costs);
  EXPECT_EQ(section_text(program, SectionKind::kUpdate),
            "reload_states b; update a; await_states b; update b; offload_states b; "
            "update norms; evict_states b; gather norms; wait norms; ");
}

TEST(OffloadAdamStates, MicroBatchesKeepMovesInTheUpdate) {
  const UnitCost costs;
  StepProgram before = two_layers_zero3();
  before.accumulation = 2;
  const StepProgram program = moved(before, {"b"}, false, &costs);
  EXPECT_EQ(section_text(program, SectionKind::kUpdate),
            "reload_states b; update a; await_states b; update b; offload_states b; "
            "update norms; gather norms; wait norms; evict_states b; ");
}

// two_layers_zero3 with b updated in the forward.
StepProgram b_deferred() {
  StepProgram program = two_layers_zero3();
  auto& forward = program.sections[0].instrs;
  const ParamId b = *program.find_param("b");
  forward.insert(forward.begin() + 4, {Op::kUpdate, b, std::nullopt, {}});
  for (Instr& each : program.sections[2].instrs) {
    if (each.op == Op::kUpdate && each.param == b) each.op = Op::kDefer;
  }
  return program;
}

TEST(OffloadAdamStates, FollowsADeferredUpdate) {
  UnitCost costs;
  costs.host_rate = 64;  // 8 ns
  const StepProgram program = moved(b_deferred(), {"b"}, false, &costs);
  EXPECT_EQ(section_text(program, SectionKind::kForward),
            "gather a; wait a; reload_states b; run f.a; release a; await_states b; update b; "
            "offload_states b; gather b; wait b; run f.b; evict_states b; release b; ");
}

// A copy that is not done by the forward's end goes on beside the backward.
TEST(OffloadAdamStates, ADeferredUpdatesCopyOutMayTakeTheBackward) {
  UnitCost costs;
  costs.host_rate = 8;  // 64 ns
  StepProgram before = b_deferred();
  // 10 ns of the forward follow the update, 40 of the backward's runs and 10 of an accumulation.
  const StepProgram program = moved(before, {"b"}, false, &costs);
  EXPECT_EQ(section_text(program, SectionKind::kForward).find("evict_states"), std::string::npos);
  const std::string backward = section_text(program, SectionKind::kBackward);
  EXPECT_NE(backward.find("evict_states b"), std::string::npos) << backward;
  EXPECT_GT(backward.find("evict_states b"), backward.find("run b.a")) << backward;
  // Micro batches would find the copy in each backward.
  before.accumulation = 2;
  const StepProgram micro = moved(before, {"b"}, false, &costs);
  EXPECT_NE(section_text(micro, SectionKind::kForward).find("evict_states b"), std::string::npos);
}

TEST(OffloadAdamStates, TakesTheLastUpdatedAndOnlyWhatIsNeeded) {
  const StepProgram before = two_layers_zero3();
  const Bytes peak = memory_timeline(before).peak;
  EXPECT_EQ(away(moved(before, {}, false, nullptr, peak)), "");
  EXPECT_EQ(away(moved(before, {}, false, nullptr, peak - Bytes{1})), "norms");
  EXPECT_EQ(away(moved(before, {}, true, nullptr, peak - Bytes{1})), "norms");
  const StepProgram two = moved(before, {}, false, nullptr, peak - Bytes{513});
  EXPECT_EQ(away(two), "b norms");
  EXPECT_LE(memory_timeline(two).peak, peak - Bytes{513}) << sections_text(two);
  const StepProgram all = moved(before, {}, false, nullptr, Bytes{1});
  EXPECT_EQ(away(all), "a b norms");
  const auto reasons = reasons_for(all, "offload_adam_states", "");
  ASSERT_EQ(reasons.size(), 1u);
  EXPECT_NE(reasons[0].find("no other states lower it"), std::string::npos) << reasons[0];
}

TEST(OffloadAdamStates, RefusesWhatHasNoStates) {
  const StepProgram before = two_layers_zero3();
  EXPECT_EQ(error_of([&] {
              const OffloadAdamStates pass({.params = {{ParamId{7}}}});
              StepProgram program = before;
              run_pipeline(program, {&pass});
            }),
            "[passes] offload_adam_states: parameter 7 has no optimizer states to move: it is "
            "frozen or unknown, nothing updates it in one place, or another pass moves them. "
            "Leave it out.");
  const StepProgram once = moved(two_layers_zero3(), {"a"}, false);
  EXPECT_NE(error_of([&] { moved(once, {"a"}, false); }), "no error");
}

TEST(OffloadAdamStates, IsRightOnRandomPrograms) {
  const UnitCost costs;
  int lower = 0;
  for (uint32_t seed = 0; seed < 120; ++seed) {
    StepProgram before = random_program(seed);
    run_pipeline(before, PassRegistry::with_builtins(), {"zero3_compile"});
    if (!facts_of(before).contains(Fact::kUpdatesPlaced)) continue;  // all frozen
    const MemoryTimeline timeline = memory_timeline(before);
    for (int part = 1; part <= 3; ++part) {
      const Bytes budget{timeline.peak.value - timeline.peak.value * part / 8};
      for (bool synchronous : {false, true}) {
        const StepProgram program = moved(before, {}, synchronous, &costs, budget);
        EXPECT_EQ(print(program), print(moved(before, {}, synchronous, &costs, budget))) << seed;
        const Bytes peak = memory_timeline(program).peak;
        EXPECT_LE(peak, timeline.peak) << seed;
        if (peak < timeline.peak) ++lower;
        const std::string pass = synchronous ? "offload_adam_states_sync" : "offload_adam_states";
        const std::string said = reasons_for(program, pass, "").at(0);
        EXPECT_EQ(peak > budget, said.find("lower it") != std::string::npos) << seed << said;
      }
    }
  }
  EXPECT_GT(lower, 100);
}

// On a real machine's numbers: copies beside compute cost less than copies at each update.
TEST(OffloadAdamStates, IsFasterThanSync) {
  const MachineCosts costs(
      load_machine(DEEPCOMPILE_SOURCE_DIR "/python/deepcompile/machines/4xh200.json"));
  StepProgram before = parse_program(layered_program({.layers = 16, .numel = 1 << 26}));
  for (Region& region : before.regions) region.time = *region.time * 100'000;
  run_pipeline(before, PassRegistry::with_builtins(), {"zero3_compile"});
  const Bytes peak = memory_timeline(before).peak;
  const Bytes budget = peak - Bytes{peak.value / 8};
  const auto planned = [&](const std::string& pass) {
    StepProgram program = before;
    run_pipeline(program, PassRegistry::with_builtins(), {pass}, planned_for(costs, budget));
    const SimResult result = simulate(program, costs);
    EXPECT_LE(result.peak, budget) << pass;
    return result.time;
  };
  const Nanos plain = simulate(before, costs).time;
  const Nanos beside = planned("offload_adam_states"), sync = planned("offload_adam_states_sync");
  std::cout << pretty(plain) << " without, " << pretty(beside) << " beside compute, "
            << pretty(sync) << " sync\n";
  EXPECT_LT(beside, sync);
}

TEST(OffloadAdamStates, EightyLayersTakeMilliseconds) {
  StepProgram before = parse_program(layered_program({.layers = 80, .numel = 1 << 24}));
  run_pipeline(before, PassRegistry::with_builtins(), {"zero3_compile"});
  const MemoryTimeline timeline = memory_timeline(before);
  for (int part : {1, 4}) {
    const Bytes budget = timeline.peak - Bytes{timeline.peak.value * part / 8};
    const std::clock_t start = std::clock();
    const StepProgram program = moved(before, {}, false, nullptr, budget);
    std::cout << part << "/8 less: " << 1000.0 * (std::clock() - start) / CLOCKS_PER_SEC
              << " ms, verification included; "
              << reasons_for(program, "offload_adam_states", "")[0] << "\n";
  }
}

}  // namespace
}  // namespace deepcompile::passes_offload_adam_states_test
