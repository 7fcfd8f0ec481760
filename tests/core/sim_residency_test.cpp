// SPDX-License-Identifier: Apache-2.0
// Optimizer states and activations that go to the host and back, by hand as in
// sim_steady_test.cpp: each direction of the host link moves 1 byte a ns.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "analysis/memory_timeline.h"
#include "critical_path.h"
#include "ir/text.h"
#include "report/compare.h"
#include "report/explain.h"
#include "report/trace.h"
#include "sim/simulator.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::sim_residency_test {
namespace {

// Shard 256 B, moments 512, gathered 512, s 1000.
StepProgram step(const std::string& forward, const std::string& backward,
                 const std::string& update) {
  return parse_program(R"(step train world=2
param a f32 128
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

const std::string kForward = "gather a\nwait a\nrun f\nrelease a\n";
const std::string kBackward = "gather a\nwait a\nrun b\nrelease a\nreduce a (ga)\naccumulate a\n";

StepProgram offloaded_states() {
  return step("reload_states a\n" + kForward + "await_states a\n", kBackward,
              "update a\noffload_states a\nevict_states a\n");
}

StepProgram offloaded_value() {
  return step(kForward + "offload (s)\nevict (s)\n",
              "reload (s)\ngather a\nwait a\nawait (s)\nrun b\nrelease a\nreduce a (ga)\n"
              "accumulate a\n",
              "update a\n");
}

const SimItem& item_of(const StepProgram& program, const SimResult& result,
                       const std::string& label) {
  for (const SimItem& item : result.items) {
    if (item_label(program, item) == label) return item;
  }
  throw std::runtime_error("no " + label);
}

void expect_consistent(const StepProgram& program, const SimResult& result) {
  EXPECT_EQ(memory_timeline(program).peak, result.peak);
  EXPECT_EQ(memory_peak(program), result.peak);
  const SimSummary summary = simulate_summary(program, UnitCost());
  EXPECT_EQ(summary.time, result.time);
  EXPECT_EQ(summary.peak, result.peak);
  const UnitCost costs;
  const CriticalPath path = critical_path(
      program, [&](const Section&, const Instr& instr) { return costs.duration(program, instr); });
  EXPECT_LE(path.length, result.time);
}

TEST(States, MoveBesideComputeAndTheLink) {
  const StepProgram program = offloaded_states();
  UnitCost costs;
  costs.slowdown = 2;  // of kernels beside the link between ranks, not of these
  const SimResult result = simulate(program, costs);
  // The reload is over when f starts (512), so awaiting it costs nothing. f 612,
  // gather 1124, b 1324, reduce 1836, accumulate 1846, update 1896; the copy out
  // ends 2408, and the evict waits for it.
  EXPECT_EQ(item_of(program, result, "reload_states a").end, Nanos{512});
  EXPECT_EQ(item_of(program, result, "reload_states a").resource, Resource::kToDevice);
  EXPECT_EQ(item_of(program, result, "await_states a").stall, Nanos{0});
  EXPECT_EQ(item_of(program, result, "offload_states a").resource, Resource::kToHost);
  EXPECT_EQ(item_of(program, result, "evict_states a").stall, Nanos{512});
  EXPECT_EQ(result.time, Nanos{2408});
  EXPECT_EQ(result.to_host_busy, Nanos{512});
  EXPECT_EQ(result.to_device_busy, Nanos{512});
  // Between steps only the shard is there.
  EXPECT_EQ(result.resident, Bytes{256});
  EXPECT_EQ(result.memory.back().bytes, Bytes{256});
  expect_consistent(program, result);
}

TEST(States, MemoryGoesAtEvictAndComesBackAtReload) {
  const MemoryTimeline timeline = memory_timeline(offloaded_states());
  EXPECT_EQ(timeline.base, Bytes{256});
  EXPECT_EQ(timeline.points[0].during, Bytes{256 + 512 + 64});  // reload_states, and x
  const size_t last = timeline.points.size() - 1;
  EXPECT_EQ(timeline.points[last - 1].after, Bytes{768});  // offload_states
  EXPECT_EQ(timeline.points[last].during, Bytes{768});
  EXPECT_EQ(timeline.points[last].after, Bytes{256});
  // At run b: x is gone with f; s, loss, t.loss, ga, and a's full buffer.
  EXPECT_EQ(timeline.peak, Bytes{768 + 512 + 1000 + 4 + 4 + 512});
  EXPECT_EQ(timeline.at_peak.moments, Bytes{512});
}

TEST(States, ComeBackByThemselvesForAnUpdate) {
  const StepProgram program =
      step(kForward, kBackward, "update a\noffload_states a\nevict_states a\n");
  const SimResult result = simulate(program, UnitCost());
  // accumulate ends 1846; 512 in, update 50, 512 out.
  const SimItem& copy = item_of(program, result, "reload_states a");
  EXPECT_EQ(copy.start, Nanos{1846});
  EXPECT_EQ(copy.stall, Nanos{512});
  EXPECT_EQ(item_of(program, result, "update a").start, Nanos{2358});
  EXPECT_EQ(result.time, Nanos{2408 + 512});
  EXPECT_EQ(result.stall, Nanos{3 * 512 + 2 * 512});
  // Without states in between, run b needs less: 2280. The update has the gradient.
  EXPECT_EQ(result.peak, Bytes{256 + 512 + 1000 + 4 + 4 + 512});
  expect_consistent(program, result);
}

TEST(States, AreBroughtInByADeferredUpdate) {
  const StepProgram program =
      step("gather a\noffload_states a\nwait a\nrun f\nrelease a\nevict_states a\n", kBackward,
           "defer a\n");
  const SimResult result = simulate(program, UnitCost());
  // reload 512, update 562, gather and offload side by side to 1074, f 1174;
  // the evict waits for nothing. gather 1686, b 1886, reduce 2398, accumulate.
  EXPECT_EQ(item_of(program, result, "offload_states a").start, Nanos{562});
  EXPECT_EQ(item_of(program, result, "gather a").start, Nanos{562});
  EXPECT_EQ(item_of(program, result, "evict_states a").stall, Nanos{0});
  EXPECT_EQ(result.time, Nanos{2408});
  EXPECT_EQ(result.resident, Bytes{256 + 256});  // shard and gradient
  expect_consistent(program, result);
}

TEST(Values, LeaveAtEvictAndComeBackAtReload) {
  const StepProgram program = offloaded_value();
  const SimResult result = simulate(program, UnitCost());
  // f ends 612; the copy out 1612, back 2612; the gather beside it 2124.
  EXPECT_EQ(item_of(program, result, "offload s").start, Nanos{612});
  EXPECT_EQ(item_of(program, result, "evict s").stall, Nanos{1000});
  EXPECT_EQ(item_of(program, result, "await s").stall, Nanos{488});
  EXPECT_EQ(result.time, Nanos{2612 + 200 + 512 + 10 + 50});
  EXPECT_EQ(result.to_host_busy, Nanos{1000});
  const MemoryTimeline timeline = memory_timeline(program);
  EXPECT_EQ(timeline.points[4].after, Bytes{768 + 1000 + 4});      // offload
  EXPECT_EQ(timeline.points[5].after, Bytes{768 + 4});             // evict
  EXPECT_EQ(timeline.points[6].after, Bytes{768 + 4 + 4 + 1000});  // reload
  expect_consistent(program, result);
}

TEST(CriticalPath, FollowsTheHostLinks) {
  const StepProgram program = offloaded_value();
  const UnitCost costs;
  const CriticalPath path = critical_path(
      program, [&](const Section&, const Instr& instr) { return costs.duration(program, instr); });
  // gather 512, f 100, out 1000, in 1000, b 200, reduce 512, accumulate 10, update 50.
  EXPECT_EQ(path.length, Nanos{512 + 100 + 2000 + 200 + 512 + 10 + 50});
}

TEST(Reports, ShowTheHostLinks) {
  const StepProgram program = offloaded_value();
  const SimResult result = simulate(program, UnitCost());
  TraceWriter trace;
  trace.add_simulated("predicted", program, result);
  const auto json = nlohmann::json::parse(trace.finish());
  int lanes = 0, copies = 0;
  for (const auto& event : json["traceEvents"]) {
    const bool lane = event["name"] == "thread_name";
    if (lane && (event["args"]["name"] == "to host" || event["args"]["name"] == "to device"))
      ++lanes;
    if (event["ph"] != "X" || event["cat"] == "evict" || event["cat"] == "await") continue;
    if (event["name"] != "offload s" && event["name"] != "reload s") continue;
    ++copies;
    EXPECT_EQ(event["dur"], 1.0);
    EXPECT_EQ(event["args"]["bytes"], 1000);
  }
  EXPECT_EQ(lanes, 2);
  EXPECT_EQ(copies, 2);
  EXPECT_NE(explain(program, result).find("copies to the host 30% and back 30%"), std::string::npos)
      << explain(program, result);
}

// A gather's deferred update, and what that brings in, are one sample with it.
TEST(Reports, CompareAddsUpWhatOneInstructionDid) {
  const StepProgram program =
      step("gather a\noffload_states a\nwait a\nrun f\nrelease a\nevict_states a\n", kBackward,
           "defer a\n");
  const auto rows = compare(program, simulate(program, UnitCost()), {}, {});
  EXPECT_EQ(rows[0].label, "gather a");
  EXPECT_EQ(rows[0].predicted, Nanos{512 + 50 + 512});
}

}  // namespace
}  // namespace deepcompile::sim_residency_test
