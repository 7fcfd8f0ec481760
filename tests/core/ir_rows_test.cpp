// SPDX-License-Identifier: Apache-2.0
// Embeddings that are exchanged by rows: text, checks, order, life of the row
// numbers, costs and plans. e has 40 rows of 32 f32 elements, 5120 B; a micro
// batch numbers 4 of them on each of two ranks, 1024 B together.
#include <gtest/gtest.h>

#include "analysis/footprint.h"
#include "analysis/liveness.h"
#include "cost/measured_costs.h"
#include "ir/merge_steps.h"
#include "ir/text.h"
#include "ir/transplant.h"
#include "ir/verifier.h"
#include "passes/gaps.h"
#include "passes/pipeline.h"
#include "plan/plan.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::ir_rows_test {
namespace {

constexpr const char* kRows = R"(step rows world=2 accumulation=1 reduce=f32

param e f32 1280
param w f32 128

value ids 32B rows=e row=32
value ids.flat 32B
value h 64B
value loss 4B
value t.loss 4B
value dh 64B
value ge 5KiB grad=e
value gw 512B grad=w

region flat code=0 (ids) -> (ids.flat)
region f code=1 (ids.flat, e) -> (h)
region l code=2 (h, w) -> (loss)
region bl code=3 (t.loss, h, w) -> (dh, gw)
region be code=4 (dh, ids.flat) -> (ge)

forward 0 (ids) -> (loss)
  run flat
  run f
  run l
end
backward 0 (t.loss) -> ()
  run bl
  run be
end
)";
constexpr const char* kUpdate = R"(step rows world=2 accumulation=1 reduce=f32
param e f32 1280
param w f32 128
update
end
)";

// 1 byte a ns to gather, half of that to reduce; 10 ns of latency.
constexpr const char* kMachine = R"({
  "name": "round", "nodes": 1, "ranks_per_node": 2,
  "device": {"name": "d", "flops": {"f32": 1e9}, "compute_efficiency": 1,
             "memory_bandwidth": 1e9, "memory_efficiency": 1, "memory_bytes": 1000000,
             "launch_overhead_ns": 0},
  "links": {"intra": {"gather_bandwidth": 1e9, "reduce_bandwidth": 0.5e9, "latency_ns": 10,
                      "compute_slowdown": 1}},
  "host": {"to_device_bandwidth": 1e9, "to_host_bandwidth": 1e9}
})";

StepProgram rows() {
  return parse_program(kRows);
}

StepProgram whole() {
  return parse_program(replaced(kRows, " rows=e row=32", ""));
}

StepProgram planned(StepProgram program) {
  run_pipeline(program, PassRegistry::with_builtins(), {"zero3_compile"});
  return program;
}

std::string refused(const std::string& text) {
  return error_of([&] { verify(parse_program(text)); });
}

TEST(Rows, AreForgotten) {
  StepProgram program = rows();
  program.forget_rows();
  EXPECT_EQ(print(program), print(whole()));
  EXPECT_EQ(program.rows_read(*program.find_param("e")), 0);
}

TEST(Rows, TextRoundTrips) {
  EXPECT_EQ(print(rows()), kRows);
}

TEST(Rows, AreCheckedWhereTheyAreNamed) {
  const std::string text = kRows;
  EXPECT_NE(refused(replaced(text, "row=32", "row=30")).find("are not rows of 30"),
            std::string::npos);
  EXPECT_NE(refused(replaced(text, "e f32 1280", "e f32 1280 whole")).find("not a sharded"),
            std::string::npos);
  EXPECT_NE(refused(replaced(text, " row=32", "")).find("not rows of 0"), std::string::npos);
  EXPECT_NE(refused(replaced(text, "value ids.flat 32B", "value ids.flat 32B rows=e row=32"))
                .find("ids.flat numbers rows of e and is an input of 0 forwards"),
            std::string::npos);
  std::string two = replaced(text, "value ids.flat 32B", "value ids.flat 32B rows=e row=32");
  two = replaced(two, "forward 0 (ids)", "forward 0 (ids, ids.flat)");
  two = replaced(replaced(two, "  run flat\n", ""), "region flat code=0 (ids) -> (ids.flat)\n", "");
  EXPECT_NE(refused(two).find("both number rows of e"), std::string::npos);
}

TEST(Rows, AreReleasedInTheSectionThatGathersThem) {
  const std::string text = print(planned(rows()));
  EXPECT_EQ(refused(text), "no error");
  EXPECT_NE(refused(replaced(text, "  release e\n", "")).find("Put `release e` before the end"),
            std::string::npos);
  const std::string dense = print(planned(whole()));
  EXPECT_EQ(refused(replaced(dense, "  release e\n", "")), "no error");
}

TEST(Rows, TellGraphsAndOrdersApart) {
  EXPECT_NE(skeleton(rows()), skeleton(whole()));
  const auto order = collective_order(planned(rows()));
  EXPECT_EQ(order, (std::vector<std::string>{"forward 0: gather e by rows", "forward 0: gather w",
                                             "backward 0: gather w", "backward 0: reduce w",
                                             "backward 0: reduce e by rows"}));
  EXPECT_TRUE(order_difference(order, collective_order(planned(whole()))).has_value());
}

// `flat` is the last run that reads ids; the gather after it reads them too.
TEST(Rows, NumbersLiveUntilTheGather) {
  const StepProgram program = planned(rows());
  const Liveness liveness = analyze_liveness(program);
  std::string freed_by;
  const auto& instrs = program.sections[0].instrs;
  for (size_t i = 0; i < instrs.size(); ++i) {
    for (ValueId id : liveness.sections[0].frees[i]) {
      if (program.value(id).name == "ids") freed_by = print(program, instrs[i]);
    }
  }
  EXPECT_EQ(freed_by, "gather e");
}

TEST(Rows, CostWhatTheyMove) {
  const MachineCosts costs(parse_machine(kMachine, "m.json"));
  const auto time = [&](const StepProgram& program, Op op) {
    return costs.duration(program, {op, program.find_param("e"), std::nullopt, {}});
  };
  // Half of 5120 B, by 1 and by 0.5 B a ns.
  EXPECT_EQ(time(whole(), Op::kGather), Nanos{2570});
  EXPECT_EQ(time(whole(), Op::kReduce), Nanos{5130});
  // Half of 64 B of numbers, 42 ns; half of 1024 B of rows, 1034 and 522 ns.
  EXPECT_EQ(time(rows(), Op::kGather), Nanos{1076});
  EXPECT_EQ(time(rows(), Op::kReduce), Nanos{522});
  const ParamId e = *rows().find_param("e");
  EXPECT_EQ(footprint(rows(), e).reduction_input, Bytes{1024});
  EXPECT_EQ(footprint(rows(), e).gathered, Bytes{5120 + 1024});
  EXPECT_EQ(footprint(whole(), e).reduction_input, Bytes{5120});
}

TEST(Rows, CostWhatWasMeasuredOfTheTransfersTheyAre) {
  const CostTable table = parse_cost_table(R"({"world": 2, "gather": [[1024, 7], [5120, 70]],
                                               "reduce": [[1024, 9], [5120, 90]]})");
  const MeasuredCosts costs(parse_machine(kMachine, "m.json"), table);
  const auto time = [&](const StepProgram& program, Op op) {
    return costs.duration(program, {op, program.find_param("e"), std::nullopt, {}});
  };
  EXPECT_EQ(time(rows(), Op::kGather), Nanos{9});
  EXPECT_EQ(time(rows(), Op::kReduce), Nanos{7});
  EXPECT_EQ(time(whole(), Op::kGather), Nanos{70});
  EXPECT_EQ(time(whole(), Op::kReduce), Nanos{90});
}

TEST(Rows, StayInMergedStepsAndAreNotKeptWhole) {
  const StepProgram merged =
      planned(merge_steps("step", {rows(), whole()}, parse_program(kUpdate)));
  const ParamId e = *merged.find_param("e");
  EXPECT_EQ(merged.rows_read(e), 4);
  EXPECT_TRUE(merged.rows_input(merged.sections[0], e).has_value());
  EXPECT_FALSE(merged.rows_input(merged.sections[1], e).has_value());
  const UnitCost costs;
  for (const Gap& gap : find_gaps(merged, costs)) EXPECT_NE(gap.id.param, e);
  bool any = false;
  for (const Gap& gap : find_gaps(planned(whole()), costs)) any |= gap.id.param == e;
  EXPECT_TRUE(any);
}

TEST(Rows, ArePartOfThePlan) {
  const Plan plan = freeze(planned(rows()));
  int named = 0;
  for (const PlanSection& section : plan.sections) {
    for (const PlanInstr& instr : section.instrs) {
      if (instr.rows < 0) continue;
      ++named;
      EXPECT_EQ(plan.values[static_cast<size_t>(instr.rows)], "ids");
      EXPECT_EQ(plan.params[static_cast<size_t>(instr.param)], "e");
    }
  }
  EXPECT_EQ(named, 2);
  EXPECT_EQ(parse_plan(serialize(plan)), plan);
  EXPECT_NE(plan.hash, freeze(planned(whole())).hash);
}

}  // namespace
}  // namespace deepcompile::ir_rows_test
