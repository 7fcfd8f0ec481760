// SPDX-License-Identifier: Apache-2.0
// Cost tables and what MeasuredCosts makes of them.
#include <gtest/gtest.h>

#include "cost/measured_costs.h"
#include "ir/text.h"
#include "test_support.h"

namespace deepcompile::cost_measured_test {
namespace {

// 1 GB/s is 1 byte a ns; memory moves 2 bytes a ns, a launch takes 5.
constexpr const char* kMachine = R"({
  "name": "round", "nodes": 1, "ranks_per_node": 4,
  "device": {"name": "d", "flops": {"f32": 2e9}, "compute_efficiency": 0.5,
             "memory_bandwidth": 4e9, "memory_efficiency": 0.5, "memory_bytes": 1000000,
             "launch_overhead_ns": 5},
  "links": {"intra": {"gather_bandwidth": 1e9, "reduce_bandwidth": 0.5e9, "latency_ns": 10,
                      "compute_slowdown": 1.5}},
  "host": {"to_device_bandwidth": 0.5e9, "to_host_bandwidth": 0.25e9}
})";

// a: 256 B a shard and 512 of moments; b: 128 and, with the master copy, 768.
constexpr const char* kProgram = R"(
step t world=2
param a f32 128
param b bf16 128
param r f32 128 replicated
value x 100B
value y 300B
region timed time=77ns (x, a) -> (y)
region untimed moved=2000B (x, a) -> (y)
)";

Curve curve(std::vector<std::pair<int64_t, int64_t>> pairs) {
  std::vector<Curve::Point> points;
  for (const auto& [bytes, ns] : pairs) points.emplace_back(Bytes{bytes}, Nanos{ns});
  return Curve(std::move(points), "[cost] test");
}

Nanos cost(const CostTable& table, const std::string& op, const std::string& operand,
           const std::string& header = "") {
  StepProgram program =
      parse_program(replaced(kProgram, "step t world=2", "step t world=2 " + header));
  Instr instr;
  instr.op = *parse_op(op);
  instr.param = program.find_param(operand);
  instr.region = program.find_region(operand);
  if (traits(instr.op).takes_values) {
    instr.values = {*program.find_value("x"), *program.find_value("y")};
  }
  return MeasuredCosts(parse_machine(kMachine), table).duration(program, instr);
}

CostTable full_table() {
  CostTable table;
  table.world = 2;
  table.curve(CurveKind::kGather) = curve({{256, 1000}, {512, 2000}});
  table.curve(CurveKind::kReduce) = curve({{512, 3000}});
  table.curve(CurveKind::kToHost) = curve({{0, 10}, {1000, 1010}});
  table.curve(CurveKind::kToDevice) = curve({{0, 20}, {1000, 520}});
  table.curve(CurveKind::kUpdate) = curve({{0, 0}, {256, 512}});
  table.curve(CurveKind::kAccumulate) = curve({{0, 7}, {256, 107}});
  table.curve(CurveKind::kNorm) = curve({{0, 90}});
  table.compute_slowdown = 1.25;
  table.to_device_beside = 0.55;
  table.to_host_beside = 0.88;
  table.run_overhead = Nanos{3};
  return table;
}

TEST(Curve, InterpolatesAndExtrapolates) {
  const Curve two = curve({{100, 50}, {200, 80}, {400, 100}});
  EXPECT_EQ(two.at(Bytes{1}), Nanos{50});  // latency
  EXPECT_EQ(two.at(Bytes{100}), Nanos{50});
  EXPECT_EQ(two.at(Bytes{150}), Nanos{65});
  EXPECT_EQ(two.at(Bytes{300}), Nanos{90});
  EXPECT_EQ(two.at(Bytes{400}), Nanos{100});
  EXPECT_EQ(two.at(Bytes{1400}), Nanos{200});  // 0.1 ns a byte goes on
  const Curve one = curve({{100, 50}});
  EXPECT_EQ(one.at(Bytes{10}), Nanos{50});
  EXPECT_EQ(one.at(Bytes{300}), Nanos{150});
  // Noise must not make more bytes take no time.
  EXPECT_EQ(curve({{100, 50}, {200, 40}}).at(Bytes{1000}), Nanos{40});
  EXPECT_EQ(curve({{0, 5}}).at(Bytes{1000}), Nanos{5});
}

TEST(Curve, SizesRiseAndNothingIsNegative) {
  EXPECT_EQ(error_of([] {
              curve({{100, 50}, {100, 60}});
            }),
            "[cost] test: point 1 is of 100 bytes, the one before it of 100. Give each size once, "
            "in rising order.");
  EXPECT_EQ(error_of([] {
              curve({{100, -5}});
            }),
            "[cost] test: point 0 has a negative number. Sizes and times are 0 or more.");
}

TEST(CostTable, RoundTrips) {
  EXPECT_EQ(parse_cost_table(serialize(full_table())), full_table());
  CostTable empty;
  empty.world = 8;
  EXPECT_EQ(serialize(empty), R"({"world":8})");
  EXPECT_EQ(parse_cost_table(serialize(empty)), empty);
}

TEST(CostTable, ErrorsNameThePlace) {
  const auto error = [](const std::string& text) {
    return error_of([&] { parse_cost_table(text, "plan.json"); });
  };
  EXPECT_EQ(error("{}"), "[cost] plan.json: the key \"world\" is missing. Add it.");
  EXPECT_EQ(error(R"({"world": 2, "gather": [[1, 2, 3]]})"),
            "[cost] plan.json: gather[0]: must be [bytes, nanoseconds].");
  EXPECT_EQ(error(R"({"world": 2, "gather": [[2, 1], [1, 2]]})"),
            "[cost] plan.json: gather: point 1 is of 1 bytes, the one before it of 2. Give each "
            "size once, in rising order.");
  EXPECT_EQ(error(R"({"world": 2, "compute_slowdown": 0.5})"),
            "[cost] plan.json: compute_slowdown: must be from 1 (transfers do not disturb "
            "kernels) to 100.");
  for (const std::string kept : {"0", "1e-300", "0.009", "1.01", "-1"}) {
    EXPECT_EQ(error(R"({"world": 2, "to_host_beside": )" + kept + "}"),
              "[cost] plan.json: to_host_beside: must be from 0.01 to 1 (directions do not "
              "disturb each other).");
  }
  EXPECT_NE(error(R"({"world": 2, "gahter": []})").find("unknown key \"gahter\""),
            std::string::npos);
}

TEST(MeasuredCosts, GoBeforeTheMachine) {
  const CostTable table = full_table();
  EXPECT_EQ(cost(table, "run", "timed"), Nanos{80});      // 77 + 3
  EXPECT_EQ(cost(table, "run", "untimed"), Nanos{1005});  // the machine's
  EXPECT_EQ(cost(table, "gather", "a"), Nanos{2000});     // 512 B
  EXPECT_EQ(cost(table, "gather", "b"), Nanos{1000});     // 256 B
  EXPECT_EQ(cost(table, "reduce", "b"), Nanos{3000});     // 512 B in f32
  EXPECT_EQ(cost(table, "reduce", "r"), Nanos{5000});     // and a gather of 512 B
  EXPECT_EQ(cost(table, "update", "a"), Nanos{512});      // 256 B a shard
  EXPECT_EQ(cost(table, "update", "r"), Nanos{1024});     // all of it
  EXPECT_EQ(cost(table, "accumulate", "a"), Nanos{107});  // 256 B
  EXPECT_EQ(cost(table, "norm", "", "clip"), Nanos{90});
  EXPECT_EQ(cost(table, "offload", ""), Nanos{110 + 310});
  EXPECT_EQ(cost(table, "reload", ""), Nanos{70 + 170});
  EXPECT_EQ(cost(table, "offload_states", "a"), Nanos{2 * 266});
  EXPECT_EQ(cost(table, "offload_states", "b"), Nanos{3 * 266});  // f32 of 64 elements each
  EXPECT_EQ(cost(table, "reload_states", "a"), Nanos{2 * 148});
  EXPECT_EQ(cost(table, "evict", ""), Nanos{0});
  EXPECT_EQ(cost(table, "defer", "a"), Nanos{0});
}

TEST(MeasuredCosts, LeaveTheRestToTheMachine) {
  CostTable table;
  table.world = 2;
  EXPECT_EQ(cost(table, "gather", "a"), Nanos{266});
  EXPECT_EQ(cost(table, "run", "timed"), Nanos{77});
  // 400 B at 0.25 B/ns, two launches; back at 0.5 B/ns.
  EXPECT_EQ(cost(table, "offload", ""), Nanos{1610});
  EXPECT_EQ(cost(table, "reload", ""), Nanos{810});
  // Two moments of 256 B; of b a master copy too.
  EXPECT_EQ(cost(table, "offload_states", "a"), Nanos{2048 + 10});
  EXPECT_EQ(cost(table, "reload_states", "b"), Nanos{1536 + 15});
  const MeasuredCosts costs(parse_machine(kMachine), table);
  StepProgram program = parse_program(kProgram);
  EXPECT_EQ(costs.compute_slowdown(program), 1.5);
  program.accumulation = 2;
  program.boundary = true;
  // a: 512 B of gradients read, 512 of the sum read and written, at 2 B/ns.
  EXPECT_EQ(costs.local_sum(program, *program.find_param("a")), Nanos{768 + 5});
  // One reduction a step: the result is scaled in place, 256 B twice.
  EXPECT_EQ(costs.duration(program, {Op::kAccumulate, program.find_param("a"), {}, {}}),
            Nanos{256 + 5});
}

TEST(MeasuredCosts, KnowWhatIsBetweenInstructions) {
  const StepProgram program = parse_program(kProgram);
  const ParamId a = *program.find_param("a"), b = *program.find_param("b");
  CostTable table;
  table.world = 2;
  const MeasuredCosts guessed(parse_machine(kMachine), table);
  // 512 B read and written, or 256 read and 512 written, at 2 B/ns, and a launch.
  EXPECT_EQ(guessed.staging(program, a), Nanos{512 + 5});
  EXPECT_EQ(guessed.staging(program, b), Nanos{384 + 5});
  EXPECT_EQ(guessed.section_overhead(program, SectionKind::kBackward), Nanos{0});
  table.curve(CurveKind::kStaging) = curve({{512, 70}});
  table.overhead(SectionKind::kBackward) = Nanos{9};
  EXPECT_EQ(parse_cost_table(serialize(table)), table);
  const MeasuredCosts costs(parse_machine(kMachine), table);
  EXPECT_EQ(costs.staging(program, b), Nanos{70});
  EXPECT_EQ(costs.section_overhead(program, SectionKind::kBackward), Nanos{9});
  EXPECT_EQ(costs.section_overhead(program, SectionKind::kForward), Nanos{0});
  EXPECT_EQ(error_of([] {
              parse_cost_table(R"({"world": 2, "section_overhead_ns": {"forwards": 1}})", "t");
            }),
            "[cost] t: section_overhead_ns: has no kind of section \"forwards\". Known: forward, "
            "backward, inference, update.");
}

TEST(MeasuredCosts, KnowWhatHostCopiesLeaveEachOther) {
  const StepProgram program = parse_program(kProgram);
  const Machine machine =
      parse_machine(replaced(kMachine, "\"to_host_bandwidth\": 0.25e9",
                             "\"to_host_bandwidth\": 0.25e9, \"to_device_beside\": 0.5"));
  CostTable table;
  table.world = 2;
  EXPECT_EQ(MeasuredCosts(machine, table).host_beside(program),
            (HostBeside{.to_device = 0.5, .to_host = 1}));
  table.to_host_beside = 0.75;
  EXPECT_EQ(MeasuredCosts(machine, table).host_beside(program),
            (HostBeside{.to_device = 0.5, .to_host = 0.75}));
  table.to_device_beside = 0.25;
  EXPECT_EQ(MeasuredCosts(machine, table).host_beside(program),
            (HostBeside{.to_device = 0.25, .to_host = 0.75}));
}

TEST(MeasuredCosts, AreOfOneWorld) {
  CostTable table = full_table();
  EXPECT_EQ(MeasuredCosts(parse_machine(kMachine), table).compute_slowdown(parse_program(kProgram)),
            1.25);
  table.world = 4;
  EXPECT_EQ(error_of([&] { cost(table, "gather", "a"); }),
            "[cost] cost table: was measured with 4 ranks, the program is for 2. Measure with as "
            "many, or use the machine description alone.");
}

}  // namespace
}  // namespace deepcompile::cost_measured_test
