// SPDX-License-Identifier: Apache-2.0
// Costs on a machine of round numbers: 1 GB/s is 1 byte a ns.
#include <gtest/gtest.h>

#include <filesystem>

#include "base/error.h"
#include "cost/cost_model.h"
#include "ir/text.h"

namespace deepcompile::cost_test {
namespace {

constexpr const char* kMachine = R"({
  "name": "round",
  "nodes": 2,
  "ranks_per_node": 2,
  "device": {
    "name": "d",
    "flops": {"f32": 2e9, "bf16": 8e9},
    "compute_efficiency": 0.5,
    "memory_bandwidth": 4e9,
    "memory_efficiency": 0.5,
    "memory_bytes": 1000000,
    "launch_overhead_ns": 5
  },
  "links": {
    "intra": {"gather_bandwidth": 1e9, "reduce_bandwidth": 0.5e9, "latency_ns": 10,
              "compute_slowdown": 1.5},
    "inter": {"gather_bandwidth": 0.25e9, "reduce_bandwidth": 0.25e9, "latency_ns": 100,
              "compute_slowdown": 2}
  },
  "host": {"to_device_bandwidth": 1e9, "to_host_bandwidth": 1e9},
  "notes": {"all": "made up"}
})";

std::string edited(const std::string& from, const std::string& to) {
  std::string text = kMachine;
  const size_t at = text.find(from);
  if (at == std::string::npos) throw std::runtime_error("no " + from);
  return text.replace(at, from.size(), to);
}

void expect_error(const std::string& text, const std::string& message) {
  try {
    parse_machine(text, "m.json");
    FAIL() << "no error; expected: " << message;
  } catch (const UserError& error) {
    EXPECT_EQ(std::string(error.what()), "[cost] m.json: " + message);
  }
}

TEST(Machine, ErrorsNameThePlace) {
  expect_error(edited("\"gather_bandwidth\": 1e9", "\"gather_bandwidth\": -5"),
               "links.intra.gather_bandwidth: must be greater than 0, is -5.");
  expect_error(edited("\"memory_bandwidth\": 4e9,", ""),
               "device: the key \"memory_bandwidth\" is missing. Add it.");
  expect_error(edited("\"nodes\": 2,", "\"nodes\": 2, \"noodles\": 1,"),
               "unknown key \"noodles\". Known keys: name, nodes, ranks_per_node, device, links, "
               "host, notes.");
  expect_error(edited("\"nodes\": 2", "\"nodes\": 0"), "nodes: must be from 1 to 1048576, is 0.");
  expect_error(edited("\"nodes\": 2", "\"nodes\": 1.5"), "nodes: must be a whole number, is 1.5.");
  expect_error(edited("\"name\": \"d\"", "\"name\": 3"), "device.name: must be a string, is 3.");
  expect_error(edited("\"compute_efficiency\": 0.5", "\"compute_efficiency\": 1.5"),
               "device.compute_efficiency: must be at most 1: it is a fraction of the peak.");
  expect_error(edited("\"compute_slowdown\": 1.5", "\"compute_slowdown\": 0.5"),
               "links.intra.compute_slowdown: must be from 1 (transfers do not disturb kernels) to "
               "100.");
  expect_error(edited("\"to_host_bandwidth\": 1e9",
                      "\"to_host_bandwidth\": 1e9, "
                      "\"to_host_beside\": 1.5"),
               "host.to_host_beside: must be at most 1: it is a fraction of the direction's own "
               "speed.");
  expect_error(edited("\"to_host_bandwidth\": 1e9",
                      "\"to_host_bandwidth\": 1e9, "
                      "\"to_device_beside\": 0"),
               "host.to_device_beside: must be greater than 0, is 0.");
  expect_error(edited("\"to_host_bandwidth\": 1e9",
                      "\"to_host_bandwidth\": 1e9, "
                      "\"to_device_beside\": 1e-300"),
               "host.to_device_beside: must be at least 0.01: measure it, or leave it out.");
  expect_error(edited("\"bf16\"", "\"bf17\""),
               "device.flops: unknown element type \"bf17\". Known: f32, f16, bf16, f64.");
  expect_error(edited("\"inter\"", "\"outer\""),
               "links: unknown key \"outer\". Known keys: intra, inter.");
  expect_error("{\"name\": }", "line 1, column 10: not JSON at \"}\". Correct the syntax there.");
}

TEST(Machine, HostDirectionsMayDisturbEachOther) {
  EXPECT_EQ(parse_machine(kMachine).host.beside, HostBeside{});
  const Machine machine = parse_machine(
      edited("\"to_host_bandwidth\": 1e9",
             "\"to_host_bandwidth\": 1e9, \"to_device_beside\": 0.5, \"to_host_beside\": 0.75"));
  EXPECT_EQ(machine.host.beside, (HostBeside{.to_device = 0.5, .to_host = 0.75}));
  EXPECT_EQ(MachineCosts(machine).host_beside(StepProgram()), machine.host.beside);
}

TEST(HostBeside, ComesFromCopiesAloneAndTogether) {
  const auto beside = [](HostTimes alone, HostTimes together) {
    return host_beside(alone, together);
  };
  // Both busy to 1250: to the host 1000 at 0.8, to the device 625 at 0.5, then 375 alone.
  EXPECT_EQ(beside({Nanos{1000}, Nanos{1000}}, {Nanos{1625}, Nanos{1250}}),
            (HostBeside{.to_device = 0.5, .to_host = 0.8}));
  // Not disturbed, whichever takes longer; nor faster than alone.
  EXPECT_EQ(beside({Nanos{1000}, Nanos{400}}, {Nanos{1000}, Nanos{400}}), HostBeside{});
  EXPECT_EQ(beside({Nanos{1000}, Nanos{400}}, {Nanos{900}, Nanos{300}}), HostBeside{});
  EXPECT_EQ(beside({Nanos{1}, Nanos{1}}, {Nanos{0}, Nanos{0}}), HostBeside{});
  // Always a fraction above 0.
  EXPECT_GT(beside({Nanos{10}, Nanos{1000}}, {Nanos{5000}, Nanos{1000}}).to_device, 0);
}

TEST(Machine, NodesNeedALinkBetweenThem) {
  std::string text = kMachine;
  const size_t from = text.find(",\n    \"inter\"");
  text.erase(from, text.find("  },\n  \"host\"") - from - 1);
  expect_error(text, "links: the key \"inter\" is missing: 2 nodes need a link between them.");
}

TEST(Machine, AMissingFileIsNamed) {
  EXPECT_THROW(load_machine("/no/such/machine.json"), UserError);
}

TEST(Machine, BuiltInsAreValid) {
  int count = 0;
  const std::filesystem::path folder =
      std::filesystem::path(DEEPCOMPILE_SOURCE_DIR) / "python/deepcompile/machines";
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const Machine machine = load_machine(entry.path().string());
    EXPECT_EQ(machine.name, entry.path().stem().string());
    EXPECT_FALSE(machine.notes.empty());
    ++count;
  }
  EXPECT_EQ(count, 4);
}

TEST(CollectiveTime, WithinANode) {
  const Machine machine = parse_machine(kMachine);
  // 1 step of 10 ns, and half of 1000 B at 1 B/ns; reductions at half the rate.
  EXPECT_EQ(collective_time(machine, Collective::kAllGather, 2, Bytes{1000}), Nanos{510});
  EXPECT_EQ(collective_time(machine, Collective::kReduceScatter, 2, Bytes{1000}), Nanos{1010});
  EXPECT_EQ(collective_time(machine, Collective::kAllGather, 1, Bytes{1000}), Nanos{0});
}

TEST(CollectiveTime, AcrossNodesTheSlowerLinkSetsThePace) {
  const Machine machine = parse_machine(kMachine);
  // Latencies 10 + 100. Between nodes 1000 * 1 / 4 = 250 B at 0.25 B/ns: 1000 ns;
  // within a node 500 B at 1 B/ns: 500 ns, hidden.
  EXPECT_EQ(collective_time(machine, Collective::kAllGather, 4, Bytes{1000}), Nanos{1110});
  // Reductions within a node take 500 / 0.5 = 1000 ns, as long.
  EXPECT_EQ(collective_time(machine, Collective::kReduceScatter, 4, Bytes{1000}), Nanos{1110});
}

TEST(CollectiveTime, RanksMustFitTheMachine) {
  const Machine machine = parse_machine(kMachine);
  EXPECT_THROW(collective_time(machine, Collective::kAllGather, 5, Bytes{8}), UserError);
  EXPECT_THROW(collective_time(machine, Collective::kAllGather, 3, Bytes{8}), UserError);
}

// f32: 1 flop a ns; bf16: 4. Memory: 2 B a ns. Each launch 5 ns.
constexpr const char* kProgram = R"(
step t world=2 reduce=bf16
param a f32 128
param b bf16 256
param r f32 128 replicated
value x 8B
value y 8B
region compute_bound flops=1000 moved=1000B (x, a) -> (y)
region memory_bound flops=1000 moved=4000B (x, a) -> (y)
region narrow flops=1000 moved=8B (x, b) -> (y)
region no_param flops=1000 moved=8B (x) -> (y)
region measured time=77ns flops=1000 moved=4000B (x, a) -> (y)
)";

Nanos cost(const std::string& op, const std::string& operand, int64_t accumulation = 1) {
  StepProgram program = parse_program(kProgram);
  program.accumulation = accumulation;
  Instr instr;
  instr.op = *parse_op(op);
  instr.param = program.find_param(operand);
  instr.region = program.find_region(operand);
  return MachineCosts(parse_machine(kMachine)).duration(program, instr);
}

TEST(MachineCosts, RegionsFollowTheRoofline) {
  EXPECT_EQ(cost("run", "compute_bound"), Nanos{1005});
  EXPECT_EQ(cost("run", "memory_bound"), Nanos{2005});
  EXPECT_EQ(cost("run", "narrow"), Nanos{255});
  EXPECT_EQ(cost("run", "no_param"), Nanos{1005});  // as most parameter elements: f32
  EXPECT_EQ(cost("run", "measured"), Nanos{77});
}

TEST(MachineCosts, ParameterInstructions) {
  // a: 512 B whole, 256 B over the link, 10 ns latency.
  EXPECT_EQ(cost("gather", "a"), Nanos{266});
  // Reduced as bf16: 256 B whole, 128 B at 0.5 B/ns.
  EXPECT_EQ(cost("reduce", "a"), Nanos{266});
  // Replicated: the all-gather of the 256 B after it, 128 + 10.
  EXPECT_EQ(cost("reduce", "r"), Nanos{266 + 138});
  // 64 elements of 2 B, read and written: 256 B at 2 B/ns.
  EXPECT_EQ(cost("accumulate", "a"), Nanos{133});
  // 64 * (2 + 4 + 4): result and sum read, sum written.
  EXPECT_EQ(cost("accumulate", "a", 2), Nanos{325});
  // f32: gradient 2, moments 16, weights 8 an element: 64 * 26 B.
  EXPECT_EQ(cost("update", "a"), Nanos{837});
  // bf16 with a master copy: 2 + 16 + 8 + 2 an element, 128 elements.
  EXPECT_EQ(cost("update", "b"), Nanos{1797});
  EXPECT_EQ(cost("wait", "a"), Nanos{0});
  EXPECT_EQ(cost("release", "a"), Nanos{0});
}

TEST(MachineCosts, TheSlowdownIsTheWorstLinkInUse) {
  const MachineCosts costs(parse_machine(kMachine));
  StepProgram program;
  program.world = 1;
  EXPECT_EQ(costs.compute_slowdown(program), 1);
  program.world = 2;
  EXPECT_EQ(costs.compute_slowdown(program), 1.5);
  program.world = 4;
  EXPECT_EQ(costs.compute_slowdown(program), 2);
}

TEST(MachineCosts, AnUnknownRateIsAnError) {
  const Machine machine = parse_machine(edited("\"f32\": 2e9, ", ""));
  StepProgram program = parse_program(kProgram);
  EXPECT_THROW(fill_analytic_times(program, machine), UserError);
}

TEST(MachineCosts, WhatTakesForEverIsAnError) {
  const Machine machine =
      parse_machine(edited("\"memory_bandwidth\": 4e9", "\"memory_bandwidth\": 1e-6"));
  StepProgram program = parse_program(kProgram);
  EXPECT_THROW(fill_analytic_times(program, machine), UserError);
}

TEST(MachineCosts, FillKeepsMeasuredTimes) {
  StepProgram program = parse_program(kProgram);
  EXPECT_EQ(fill_analytic_times(program, parse_machine(kMachine)), 4);
  EXPECT_EQ(program.region(*program.find_region("measured")).time, Nanos{77});
  EXPECT_EQ(program.region(*program.find_region("narrow")).time, Nanos{255});
}

}  // namespace
}  // namespace deepcompile::cost_test
