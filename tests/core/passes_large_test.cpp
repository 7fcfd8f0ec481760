// SPDX-License-Identifier: Apache-2.0
// A step of 80 layers: everything here is linear in its size.
#include <gtest/gtest.h>

#include <ctime>

#include "analysis/liveness.h"
#include "analysis/memory_timeline.h"
#include "ir/text.h"
#include "ir/verifier.h"
#include "passes/pipeline.h"
#include "planned_for.h"
#include "test_support.h"

namespace deepcompile::passes_large_test {
namespace {

constexpr int kLayers = 80;
constexpr int kRegionsPerLayer = 6;  // and as many in the backward

// A chain of regions with a 16 Mi element parameter each, 8 saved values each,
// and all norms in one pack.
std::string large_step() {
  const int regions = kLayers * kRegionsPerLayer;
  std::string params, values, forward, backward, run_forward, run_backward;
  for (int i = 0; i < regions; ++i) {
    const std::string n = std::to_string(i);
    params += "param layers." + n + ".weight bf16 16777216\n";
    std::string saved;
    for (int k = 0; k < 8; ++k) {
      const std::string name = "s." + n + "." + std::to_string(k);
      values += "value " + name + " 8MiB\n";
      saved += ", " + name;
    }
    values += "value h." + n + " 8MiB\nvalue d." + n + " 8MiB\nvalue g." + n +
              " 32MiB grad=layers." + n + ".weight\n";
    const std::string before = i == 0 ? "x" : "h." + std::to_string(i - 1);
    const std::string after = i + 1 == regions ? "t" : "d." + std::to_string(i + 1);
    forward += "region f." + n + " code=" + std::to_string(i % kRegionsPerLayer) +
               " workspace=64MiB moved=1GiB flops=1000000000 time=1500us (" + before + ", layers." +
               n + ".weight, norms) -> (h." + n + saved + ")\n";
    backward += "region b." + n + " code=7 workspace=64MiB time=3ms (" + after + ", layers." + n +
                ".weight" + saved + ") -> (d." + n + ", g." + n + ")\n";
    run_forward += "  run f." + n + "\n";
    run_backward = "  run b." + n + "\n" + run_backward;
  }
  return "step large world=4\nparam norms bf16 4096 whole frozen\n" + params +
         "value x 8MiB\nvalue t 8MiB\n" + values + forward + backward + "forward 0 (x) -> (h." +
         std::to_string(regions - 1) + ")\n" + run_forward + "end\nbackward 0 (t) -> ()\n" +
         run_backward + "end\nupdate\nend\n";
}

TEST(LargeStep, TakesMilliseconds) {
  const std::string text = large_step();
  // CPU time: other work on the machine has no part in it.
  const auto cpu = [] { return Nanos{std::clock() * (1'000'000'000 / CLOCKS_PER_SEC)}; };
  const Nanos start = cpu();
  Nanos last = start;
  std::string report;
  const auto lap = [&](const char* what) {
    const Nanos now = cpu();
    report += std::string(report.empty() ? "" : ", ") + what + " " + pretty(now - last);
    last = now;
  };
  StepProgram program = parse_program(text);
  lap("parse");
  run_pipeline(program, PassRegistry::with_builtins(), {"zero3_compile"});
  lap("zero3_compile with verification");
  verify(program);
  lap("verify");
  const MemoryTimeline timeline = memory_timeline(program);
  lap("memory");
  const std::string printed = print(program);
  lap("print");
  const Nanos total = cpu() - start;
  std::cout << text.size() / 1024 << " KiB of text, " << program.regions.size()
            << " regions: " << report << "\n";
  EXPECT_EQ(program.regions.size(), 960u);
  EXPECT_GT(timeline.peak, timeline.base);
  EXPECT_EQ(print(parse_program(printed)), printed);
  // Milliseconds; the limit is passed by anything that grows with the square.
  if (!kSanitized) {
    EXPECT_LT(total, Nanos{2'000'000'000});
  }
}

// On a real machine's numbers, with a budget that holds a part of the parameters.
TEST(LargeStep, IsReplannedInMilliseconds) {
  StepProgram program = parse_program(large_step());
  run_pipeline(program, PassRegistry::with_builtins(), {"zero3_compile"});
  const MachineCosts costs(
      load_machine(DEEPCOMPILE_SOURCE_DIR "/python/deepcompile/machines/4xh200.json"));
  const Bytes budget = memory_timeline(program).peak + Bytes{int64_t{4} << 30};
  PipelineOptions options = planned_for(costs, budget);
  options.clock = [] { return Nanos{std::clock() * (1'000'000'000 / CLOCKS_PER_SEC)}; };
  const Nanos before = simulate(program, costs).time;
  const auto log = run_pipeline(program, PassRegistry::with_builtins(),
                                {"prefetch", "selective_gather"}, options);
  std::cout << print(log);
  EXPECT_LE(memory_timeline(program).peak, budget);
  EXPECT_LT(simulate(program, costs).time, before);
  // Tens of milliseconds when optimised, on a quiet machine.
  for (const PassRecord& each : log) {
    if (!kSanitized) {
      EXPECT_LT(*each.time, Nanos{1'000'000'000}) << each.pass;
    }
  }
}

// At budgets from generous to tight: the plan is there at once, and fits.
TEST(LargeStep, IsPlannedByAutoAtOnce) {
  const StepProgram plain = parse_program(large_step());
  StepProgram classical = plain;
  run_pipeline(classical, PassRegistry::with_builtins(), {"zero3_compile"});
  const MachineCosts costs(
      load_machine(DEEPCOMPILE_SOURCE_DIR "/python/deepcompile/machines/4xh200.json"));
  const SimResult before = simulate(classical, costs);
  for (const int64_t percent :
       kSanitized ? std::vector<int64_t>{100, 40} : std::vector<int64_t>{130, 100, 60, 40}) {
    const Bytes budget{before.peak.value / 100 * percent};
    PipelineOptions options = planned_for(costs, budget);
    options.clock = [] { return Nanos{std::clock() * (1'000'000'000 / CLOCKS_PER_SEC)}; };
    StepProgram program = plain;
    const auto log = run_pipeline(program, PassRegistry::with_builtins(), {"auto"}, options);
    std::cout << percent << "% of the plain peak: " << print(log) << "  " << program.reasons[0].text
              << "\n";
    EXPECT_LE(memory_timeline(program).peak, budget);
    const SimResult after = simulate(program, costs);
    EXPECT_LE(after.peak, budget);
    if (percent >= 100) {
      EXPECT_LE(after.time, before.time);
    }
    // About 100 ms when optimised, on a quiet machine.
    if (!kSanitized) {
      EXPECT_LT(*log[0].time, Nanos{3'000'000'000});
    }
  }
}

}  // namespace
}  // namespace deepcompile::passes_large_test
