// SPDX-License-Identifier: Apache-2.0
// Expected times are worked out by hand on the machine of unit_cost.h: the
// link moves 1 byte a ns. A parameter of 128 f32 elements is 512 B: a gather
// or a reduction takes 512 ns.
#include <gtest/gtest.h>

#include "base/error.h"
#include "ir/text.h"
#include "sim/simulator.h"
#include "unit_cost.h"

namespace deepcompile::sim_test {
namespace {

// Two frozen parameters and two regions of 600 ns; `body` is the section.
StepProgram two_layers(const std::string& body) {
  return parse_program(R"(
step two world=2
param a f32 128 frozen
param b f32 128 frozen
value x 100B
value y 200B
value z 300B
region fa workspace=40B time=600ns (x, a) -> (y)
region fb time=600ns (y, b) -> (z)
inference 0 (x) -> (z)
)" + body + "end\n");
}

constexpr const char* kSerial = R"(
  gather a
  wait a
  run fa
  release a
  gather b
  wait b
  run fb
  release b
)";

constexpr const char* kPrefetched = R"(
  gather a
  gather b
  wait a
  run fa
  release a
  wait b
  run fb
  release b
)";

const SimItem& item_of(const StepProgram& program, const SimResult& result,
                       const std::string& label, uint32_t micro_step = 0) {
  for (const SimItem& item : result.items) {
    const Instr& instr = program.sections[item.section].instrs[item.instr];
    if (instr_label(program, instr) == label && item.micro_step == micro_step) return item;
  }
  throw std::runtime_error("no " + label);
}

TEST(Simulator, ComputeWaitsForAGatherIssuedJustBefore) {
  const SimResult result = simulate(two_layers(kSerial), UnitCost());
  // gather a 512, run 600, gather b 512, run 600; compute stands still in both gathers.
  EXPECT_EQ(result.time, Nanos{2224});
  EXPECT_EQ(result.stall, Nanos{1024});
  EXPECT_EQ(result.compute_busy, Nanos{1200});
  EXPECT_EQ(result.link_busy, Nanos{1024});
}

TEST(Simulator, AnEarlierGatherHidesBehindCompute) {
  const StepProgram program = two_layers(kPrefetched);
  const SimResult result = simulate(program, UnitCost());
  // gather a 0-512, gather b 512-1024 beside run fa 512-1112, run fb 1112-1712.
  EXPECT_EQ(result.time, Nanos{1712});
  EXPECT_EQ(result.stall, Nanos{512});
  const SimItem& gather = item_of(program, result, "gather b");
  EXPECT_EQ(gather.issue, Nanos{0});
  EXPECT_EQ(gather.start, Nanos{512});  // one transfer at a time
  EXPECT_EQ(gather.end, Nanos{1024});
}

TEST(Simulator, TransfersSlowTheKernelsBesideThem) {
  UnitCost costs;
  costs.slowdown = 2;
  const SimResult result = simulate(two_layers(kPrefetched), costs);
  // run fa from 512: beside gather b until 1024 it does 512 / 2 = 256 of its
  // 600 ns, the other 344 alone: ends 1368. run fb ends 1968.
  EXPECT_EQ(result.time, Nanos{1968});
  EXPECT_EQ(result.compute_busy, Nanos{1456});
}

TEST(Simulator, GatheringWhatIsWholeCostsNothing) {
  const SimResult result = simulate(two_layers(R"(
  gather a
  gather a
  wait a
  run fa
  gather a
  wait a
  gather b
  wait b
  run fb
  release a
  release b
)"),
                                    UnitCost());
  EXPECT_EQ(result.link_busy, Nanos{1024});
  EXPECT_EQ(result.time, Nanos{2224});
}

TEST(Simulator, MemoryFollowsBuffersAndValues) {
  const SimResult result = simulate(two_layers(kSerial), UnitCost());
  // Between steps: two shards of 64 f32 elements, 512 B.
  EXPECT_EQ(result.resident, Bytes{512});
  const std::vector<MemoryPoint> expected = {
      {Nanos{0}, Bytes{512 + 100 + 512}},      // x, a's full buffer
      {Nanos{512}, Bytes{1124 + 200 + 40}},    // y and fa's workspace
      {Nanos{1112}, Bytes{1124 + 200 - 100}},  // less x and the workspace; b for a
      {Nanos{1624}, Bytes{1224 + 300}},        // z
      {Nanos{2224}, Bytes{512}},               // all handed over or freed
  };
  EXPECT_EQ(result.memory, expected);
  EXPECT_EQ(result.peak, Bytes{1524});
}

// One trainable parameter through forward, backward and update.
StepProgram training(const std::string& header) {
  return parse_program("step train world=2 " + header + R"(
param a f32 128
value x 64B
value loss 4B
value t.loss 4B
value ga 512B grad=a
region f time=100ns (x, a) -> (loss)
region b time=200ns (t.loss, x, a) -> (ga)
forward 0 (x) -> (loss)
  gather a
  wait a
  run f
  release a
end
backward 0 (t.loss) -> ()
  gather a
  wait a
  run b
  release a
  reduce a (ga)
  accumulate a
end
update
)" + (header.find("clip") == std::string::npos ? "" : "norm\n") +
                       "update a\nend\n");
}

TEST(Simulator, AStepEndsWithTheUpdate) {
  // gather 512, f 100, gather 512, b 200, reduce 512, accumulate 10, update 50.
  const SimResult result = simulate(training(""), UnitCost());
  EXPECT_EQ(result.time, Nanos{1896});
  EXPECT_EQ(result.stall, Nanos{3 * 512});
  // The norm adds 20.
  EXPECT_EQ(simulate(training("clip"), UnitCost()).time, Nanos{1916});
}

TEST(Simulator, AccumulationRepeatsForwardAndBackward) {
  // (512 + 100 + 512 + 200 + 512 + 10) * 2 + 50; the parameter is gathered anew each time.
  const StepProgram program = training("accumulation=2");
  const SimResult result = simulate(program, UnitCost());
  EXPECT_EQ(result.time, Nanos{1846 * 2 + 50});
  EXPECT_EQ(result.link_busy, Nanos{6 * 512});
  EXPECT_EQ(item_of(program, result, "run b", 1).start, Nanos{1846 + 1124});
  EXPECT_EQ(result.items.size(), 2 * 10 + 1u);
}

TEST(Simulator, MemoryOfAStep) {
  const SimResult result = simulate(training(""), UnitCost());
  // Shard 256 and two moments of 256 each; f32 needs no master copy.
  EXPECT_EQ(result.resident, Bytes{768});
  // Highest beside run b: x 64, loss 4, t.loss 4, a 512, ga 512.
  EXPECT_EQ(result.peak, Bytes{768 + 64 + 4 + 4 + 512 + 512});
  EXPECT_EQ(result.memory.back().bytes, Bytes{768});
  // With accumulation the f32 gradient of 256 stays from the first micro-step on.
  EXPECT_EQ(simulate(training("accumulation=2"), UnitCost()).peak, result.peak + Bytes{256});
}

TEST(Simulator, ReductionsTakeTurnsAndAccumulatesWait) {
  const StepProgram program = parse_program(R"(
step t world=2
param a f32 128 whole
param b f32 128 whole
value x 8B
value h 8B
value loss 4B
value t.loss 4B
value dh 8B
value ga 512B grad=a
value gb 512B grad=b
region fa time=100ns (x, a) -> (h)
region fb time=100ns (h, b) -> (loss)
region bb time=300ns (t.loss, h, b) -> (dh, gb)
region ba time=300ns (dh, x, a) -> (ga)
forward 0 (x) -> (loss)
  run fa
  run fb
end
backward 0 (t.loss) -> ()
  run bb
  reduce b (gb)
  run ba
  reduce a (ga)
  accumulate b
  accumulate a
end
)");
  const SimResult result = simulate(program, UnitCost());
  // Forward ends 200. bb 200-500, reduce b 500-1012, ba 500-800, reduce a is
  // issued at 800 and has the link 1012-1524. accumulate b waits to 1012 and
  // ends 1022; accumulate a waits to 1524 and ends 1534.
  const SimItem& reduce = item_of(program, result, "reduce a");
  EXPECT_EQ(reduce.issue, Nanos{800});
  EXPECT_EQ(reduce.start, Nanos{1012});
  EXPECT_EQ(item_of(program, result, "accumulate b").stall, Nanos{212});
  EXPECT_EQ(item_of(program, result, "accumulate a").stall, Nanos{502});
  EXPECT_EQ(result.time, Nanos{1534});
}

TEST(Simulator, ComputeAloneNeedsNoTransfers) {
  const StepProgram program = two_layers("  run fa\n  run fb\n");
  EXPECT_EQ(simulate(program, UnitCost()).time, Nanos{1200});
}

TEST(Simulator, RefusesAProgramThatUsesWhatIsNotThere) {
  EXPECT_THROW(simulate(two_layers("  gather a\n  run fa\n  run fb\n"), UnitCost()), UserError);
}

// The user's code before each section; transfers under way go on.
TEST(Simulator, CountsTheTimeBetweenSections) {
  const StepProgram program = parse_program(R"(
step two world=2
param a f32 128 frozen
value x 100B
value y 200B
value t 4B
value d 100B
region f time=600ns (x) -> (y)
region b time=300ns (t, y, a) -> (d)
forward 0 (x) -> ()
  run f
  gather a
end
backward 0 (t) -> ()
  gather a
  wait a
  run b
  release a
end
)");
  UnitCost costs;
  EXPECT_EQ(simulate(program, costs).time, Nanos{600 + 512 + 300});
  // 0-100 the user's, f to 700, gather 700-1212 beside his 100, b to 1512.
  costs.between = Nanos{100};
  EXPECT_EQ(simulate(program, costs).time, Nanos{100 + 600 + 512 + 300});
  // Longer than the gather: 600 and 600.
  costs.between = Nanos{600};
  const SimResult result = simulate(program, costs);
  EXPECT_EQ(result.time, Nanos{600 + 600 + 600 + 300});
  EXPECT_EQ(result.stall, Nanos{0});
  EXPECT_EQ(item_of(program, result, "run b").start, Nanos{1800});
}

// A gradient that does not go on the wire as it is: its copy keeps compute busy.
TEST(Simulator, CopiesGradientsIntoTheirReductionsBuffer) {
  const std::string text = R"(
step s world=2
param a f32 128
value x 8B
value y 8B
value t 4B
value g 512B grad=a
region f time=100ns (x) -> (y)
region b time=300ns (t) -> (g)
forward 0 (x) -> (y)
  run f
end
backward 0 (t) -> ()
  run b
  reduce a (g)
  accumulate a
end
update
  update a
end
)";
  UnitCost costs;
  costs.copy = Nanos{40};
  // In place: 100, 300, 512 on the link, 10, 50.
  EXPECT_EQ(simulate(parse_program(text), costs).time, Nanos{972});
  std::string narrow = text;
  narrow.replace(narrow.find("param a f32"), 11, "param a bf16");
  narrow.replace(narrow.find("value g 512B"), 12, "value g 256B");
  const StepProgram program = parse_program(narrow);
  const SimResult result = simulate(program, costs);
  EXPECT_EQ(result.time, Nanos{972 + 40});
  EXPECT_EQ(result.compute_busy, Nanos{100 + 300 + 40 + 10 + 50});
  EXPECT_EQ(item_of(program, result, "reduce a").start, Nanos{440});
}

// While a's states come back, b's leave, and the other way round.
TEST(Simulator, HostCopiesOfBothDirectionsSlowEachOther) {
  const StepProgram program = parse_program(R"(
step s world=2
param a f32 128
param b f32 128
value x 8B
value y 8B
region f time=100ns (x) -> (y)
inference 0 (x) -> (y)
  run f
end
update
  reload_states a
  offload_states b
  await_states a
  update a
  evict_states b
  reload_states b
  offload_states a
  await_states b
  update b
  evict_states a
end
)");
  UnitCost costs;
  // f 100, and twice copies of 512 in both directions and an update of 50.
  EXPECT_EQ(simulate(program, costs).time, Nanos{100 + 2 * (512 + 50)});
  costs.beside = {.to_device = 0.5, .to_host = 0.8};
  // To the host 512 / 0.8 = 640; to the device 320 of 512 in that time, then 192: 832.
  const SimResult result = simulate(program, costs);
  EXPECT_EQ(result.time, Nanos{100 + 2 * (832 + 50)});
  EXPECT_EQ(result.stall, Nanos{2 * 832});
  EXPECT_EQ(result.to_host_busy, Nanos{2 * 640});
  EXPECT_EQ(result.to_device_busy, Nanos{2 * 832});
  const SimItem& leaving = item_of(program, result, "offload_states a");
  EXPECT_EQ(leaving.issue, Nanos{982});
  EXPECT_EQ(leaving.start, Nanos{982});
  EXPECT_EQ(leaving.end, Nanos{982 + 640});
  EXPECT_EQ(simulate_summary(program, costs).time, result.time);
}

}  // namespace
}  // namespace deepcompile::sim_test
