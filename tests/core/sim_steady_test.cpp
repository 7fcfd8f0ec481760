// SPDX-License-Identifier: Apache-2.0
// Steps of the steady state: what a step leaves to the next one. Expected
// numbers are worked out by hand on the machine of unit_cost.h: links move 1
// byte a ns, accumulate 10, norm 20, update 50, a local sum 15.
#include <gtest/gtest.h>

#include <algorithm>

#include "analysis/memory_timeline.h"
#include "ir/text.h"
#include "sim/simulator.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::sim_steady_test {
namespace {

// One parameter of 128 f32 elements on two ranks: 512 B whole, a shard 256,
// its moments 512, its gradient 256. f takes 100 ns, b 200.
StepProgram step(const std::string& forward, const std::string& backward, const std::string& update,
                 const std::string& header = "", const std::string& placement = "") {
  return parse_program("step train world=2 " + header + "\nparam a f32 128 " + placement + R"(
value x 64B
value s 1000B
value loss 4B
value t.loss 4B
value ga 512B grad=a
region f time=100ns (x, a) -> (s, loss)
region b time=200ns (t.loss, s, a) -> (ga)
forward 0 (x) -> (loss)
)" + forward + "end\nbackward 0 (t.loss) -> ()\n" +
                       backward + "end\nupdate\n" + update + "end\n");
}

constexpr const char* kForward = "gather a\nwait a\nrun f\nrelease a\n";
constexpr const char* kBackward =
    "gather a\nwait a\nrun b\nrelease a\nreduce a (ga)\naccumulate a\n";

// "section: label start-end", one a line, of items that took time.
std::string timeline_of(const StepProgram& program, const SimResult& result) {
  std::string out;
  for (const SimItem& item : result.items) {
    if (item.end == item.start) continue;
    out += section_name(program.sections[item.section]) + "." + std::to_string(item.micro_step) +
           ": " + item_label(program, item) + " " + std::to_string(item.start.value) + "-" +
           std::to_string(item.end.value) + "\n";
  }
  return out;
}

void expect_same_peak(const StepProgram& program, const SimResult& result) {
  EXPECT_EQ(memory_timeline(program).peak, result.peak);
  EXPECT_EQ(memory_peak(program), result.peak);
  const SimSummary summary = simulate_summary(program, UnitCost());
  EXPECT_EQ(summary.time, result.time);
  EXPECT_EQ(summary.peak, result.peak);
}

TEST(SteadyState, WhatIsLeftWholeIsNotGatheredAgain) {
  StepProgram program = step("gather a\nwait a\nrun f\n", "gather a\nwait a\nrun b\n", "");
  program.params[0].trainable = false;
  program.values[index(*program.find_value("ga"))].grad_of.reset();
  const SimResult result = simulate(program, UnitCost());
  EXPECT_EQ(result.time, Nanos{300});
  EXPECT_EQ(result.link_busy, Nanos{0});
  EXPECT_EQ(result.resident, Bytes{256 + 512});  // the shard, and the full buffer
}

TEST(SteadyState, ATransferInFlightGoesOnInTheNextStep) {
  const StepProgram program =
      step("gather a\nwait a\nrun f\n", "gather a\nwait a\nrun b\nreduce a (ga)\naccumulate a\n",
           "update a\ngather a\n");
  const SimResult result = simulate(program, UnitCost());
  // The update's gather is issued at the end of a step and holds the next one up
  // for its 512 ns. f 512-612, b 612-812, reduce 812-1324, accumulate, update.
  EXPECT_EQ(timeline_of(program, result), R"(forward 0.0: wait a 0-512
forward 0.0: run f 512-612
backward 0.0: run b 612-812
backward 0.0: reduce a 812-1324
backward 0.0: accumulate a 1324-1334
update.0: update a 1334-1384
update.0: gather a 1384-1896
)");
  EXPECT_EQ(result.time, Nanos{1384});
  EXPECT_EQ(result.link_busy, Nanos{1024});
  expect_same_peak(program, result);
}

TEST(SteadyState, AQueueThatFallsBehindSetsThePace) {
  // Nobody waits for the gather, and the update makes it necessary again: 512 ns
  // of the link a step beside 150 of compute.
  const StepProgram program = parse_program(R"(
step t world=2
param a f32 128
value x 8B
value y 8B
region f time=100ns (x) -> (y)
inference 0 (x) -> (y)
  gather a
  run f
end
update
  update a
end
)");
  const SimResult result = simulate(program, UnitCost());
  EXPECT_EQ(result.time, Nanos{512});
  EXPECT_EQ(result.compute_busy, Nanos{150});
  expect_same_peak(program, result);
}

TEST(Defer, IsAppliedByTheNextGather) {
  const StepProgram program = step(kForward, kBackward, "defer a\n");
  const SimResult result = simulate(program, UnitCost());
  EXPECT_EQ(timeline_of(program, result), R"(forward 0.0: update a 0-50
forward 0.0: gather a 50-562
forward 0.0: wait a 50-562
forward 0.0: run f 562-662
backward 0.0: gather a 662-1174
backward 0.0: wait a 662-1174
backward 0.0: run b 1174-1374
backward 0.0: reduce a 1374-1886
backward 0.0: accumulate a 1886-1896
)");
  EXPECT_EQ(result.time, Nanos{1896});
  // Shard 256, moments 512, and the gradient until the gather.
  EXPECT_EQ(result.resident, Bytes{768 + 256});
  EXPECT_EQ(result.memory.back().bytes, Bytes{768 + 256});
  expect_same_peak(program, result);

  const MemoryTimeline timeline = memory_timeline(program);
  EXPECT_EQ(timeline.base, Bytes{768});
  EXPECT_EQ(timeline.points[0].during, Bytes{768 + 64 + 512});  // gradient gone, buffer there
  EXPECT_EQ(timeline.points.back().after, Bytes{768 + 256});
}

TEST(Defer, AnUpdateInTheForwardAppliesIt) {
  const StepProgram program = step("update a\n" + std::string(kForward), kBackward, "defer a\n");
  const SimResult result = simulate(program, UnitCost());
  EXPECT_EQ(timeline_of(program, result).substr(0, 62),
            "forward 0.0: update a 0-50\nforward 0.0: gather a 50-562\nforwar");
  EXPECT_EQ(result.time, Nanos{1896});
  // Without a deferral it has nothing to apply.
  const StepProgram plain = step("update a\n" + std::string(kForward), kBackward, "update a\n");
  const SimResult other = simulate(plain, UnitCost());
  EXPECT_EQ(other.time, Nanos{1896});
  EXPECT_EQ(other.resident, Bytes{768});
}

TEST(Defer, OfAWholeParameterMakesItStale) {
  const std::string use = "gather a\nwait a\n";
  const StepProgram program = step(use + "run f\n", use + "run b\nreduce a (ga)\naccumulate a\n",
                                   "defer a\n", "accumulation=2", "whole");
  // First micro batch: update 50, gather 512, f 100, b 200, reduce 512, 10;
  // second: nothing to apply, nothing to gather.
  EXPECT_EQ(simulate(program, UnitCost()).time, Nanos{50 + 512 + 2 * (100 + 200 + 512 + 10)});
  // The f32 sum of 256 lasts from the first accumulate to the next step's update.
  expect_same_peak(program, simulate(program, UnitCost()));
}

TEST(EarlyUpdate, WaitsForTheLastMicroBatch) {
  const StepProgram program =
      step(kForward, std::string(kBackward) + "update a\n", "update a\n", "accumulation=2");
  const SimResult result = simulate(program, UnitCost());
  EXPECT_EQ(result.time, Nanos{2 * (512 + 100 + 512 + 200 + 512 + 10) + 50});
  std::vector<SimItem> updates;
  for (const SimItem& item : result.items) {
    if (item.op == Op::kUpdate && item.end > item.start) updates.push_back(item);
  }
  ASSERT_EQ(updates.size(), 1u);
  EXPECT_EQ(updates[0].section, 1u);
  EXPECT_EQ(updates[0].micro_step, 1u);
  expect_same_peak(program, result);
}

TEST(Boundary, SumsLocallyAndReducesOnce) {
  const StepProgram program =
      step("run f\n", "run b\nreduce a (ga)\naccumulate a\n", "update a\ngather a\nwait a\n",
           "accumulation=2 boundary", "whole");
  const SimResult result = simulate(program, UnitCost());
  EXPECT_EQ(timeline_of(program, result), R"(forward 0.0: run f 0-100
backward 0.0: run b 100-300
backward 0.0: reduce a 300-315
forward 0.1: run f 315-415
backward 0.1: run b 415-615
backward 0.1: reduce a 615-630
backward 0.1: reduce a 630-1142
backward 0.1: accumulate a 1142-1152
update.0: update a 1152-1202
update.0: gather a 1202-1714
update.0: wait a 1202-1714
)");
  EXPECT_EQ(result.time, Nanos{1714});
  EXPECT_EQ(result.link_busy, Nanos{1024});
  // Weights 512, moments 512. In the last micro batch's reduce: the f32 sum of
  // 512, which is sent as it is, the result of 256, ga, and the caller's loss.
  EXPECT_EQ(result.resident, Bytes{1024});
  const MemoryTimeline timeline = memory_timeline(program);
  EXPECT_EQ(timeline.points[2].during, Bytes{1024 + 512 + 256 + 512 + 4});
  // But the forward's s beside the sum is more.
  EXPECT_EQ(result.peak, Bytes{1024 + 512 + 4 + 4 + 1000 + 512});
  expect_same_peak(program, result);
}

TEST(Boundary, ChangesNothingWithOneMicroBatch) {
  const StepProgram plain = step(kForward, kBackward, "update a\n");
  StepProgram boundary = plain;
  boundary.boundary = true;
  const SimResult a = simulate(plain, UnitCost()), b = simulate(boundary, UnitCost());
  EXPECT_EQ(a.time, b.time);
  EXPECT_EQ(a.memory, b.memory);
}

// s is made again in the backward; so is loss, which the caller still holds.
TEST(Recompute, PaysTimeForMemory) {
  const StepProgram program =
      step(kForward, "gather a\nwait a\nrun f\nrun b\nrelease a\nreduce a (ga)\naccumulate a\n",
           "update a\n");
  const SimResult result = simulate(program, UnitCost());
  EXPECT_EQ(result.time, Nanos{1896 + 100});
  const MemoryTimeline timeline = memory_timeline(program);
  EXPECT_EQ(timeline.points[3].after, Bytes{768 + 64 + 4});  // between: x and loss
  EXPECT_EQ(timeline.points[6].during, Bytes{768 + 512 + 64 + 4 + 4 + 1000 + 4});
  EXPECT_EQ(timeline.points[6].after, Bytes{768 + 512 + 4 + 4 + 1000});
  EXPECT_EQ(result.memory.back().bytes, Bytes{768});
  expect_same_peak(program, result);
}

}  // namespace
}  // namespace deepcompile::sim_steady_test
