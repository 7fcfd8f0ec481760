// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "base/error.h"
#include "ir/text.h"
#include "report/compare.h"
#include "report/explain.h"
#include "report/table.h"
#include "report/trace.h"
#include "unit_cost.h"

namespace deepcompile::report_test {
namespace {

StepProgram program() {
  return parse_program(R"(
step t world=2
param a f32 128 frozen
param idle f32 64 whole frozen
value x 100B
value y 200B
region f time=600ns (x, a) -> (y)
inference 3 (x) -> (y)
  gather a
  wait a
  run f
  release a
end
because zero3_compile a "kept sharded: too large"
because zero3_compile "" "the whole step"
)");
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(Explain, SaysWhereWhenAndWhy) {
  const StepProgram p = program();
  const std::string text = explain(p, simulate(p, UnitCost()));
  EXPECT_TRUE(contains(text, "step t: 2 ranks, 1 micro-step")) << text;
  EXPECT_TRUE(contains(text, "param a: f32, 128 elements, 512 B whole, sharded: 256 B a rank"));
  EXPECT_TRUE(contains(text,
                       "inference 3: gather #0 512 ns, wait #1 (compute stalled 512 ns), "
                       "release #3"))
      << text;
  EXPECT_TRUE(contains(text, "  why: kept sharded: too large [zero3_compile]"));
  EXPECT_TRUE(contains(text, "\nwhy: the whole step [zero3_compile]"));
  EXPECT_TRUE(contains(text, "no instruction moves it"));
}

TEST(Trace, HoldsBothTimelines) {
  const StepProgram p = program();
  TraceWriter trace;
  trace.add_simulated("predicted", p, simulate(p, UnitCost()));
  trace.add_measured("rank 0", {{7, &p}}, {{7, 0, 2, Nanos{5000}, Nanos{5700}}});
  const auto json = nlohmann::json::parse(trace.finish());
  int runs = 0, stalls = 0, memory = 0;
  for (const auto& event : json["traceEvents"]) {
    if (event["ph"] == "C") ++memory;
    if (event["ph"] != "X") continue;
    if (event["name"] == "wait a") {
      ++stalls;
      EXPECT_EQ(event["dur"], 0.512);  // microseconds
    }
    if (event["name"] != "run f") continue;
    ++runs;
    EXPECT_EQ(event["ts"], event["pid"] == 1 ? 0.512 : 0.0);
    EXPECT_EQ(event["dur"], event["pid"] == 1 ? 0.6 : 0.7);
  }
  EXPECT_EQ(runs, 2);
  EXPECT_EQ(stalls, 1);
  EXPECT_EQ(memory, 3);
}

TEST(Compare, PairsPredictionsWithMeasurements) {
  StepProgram p = program();
  p.sections[0].graph = 0;  // as merge_steps numbers it
  const StepProgram graph = program();
  // Measured twice: 700 and 900 ns.
  const std::vector<Record> records = {{1, 0, 2, Nanos{0}, Nanos{700}},
                                       {1, 0, 2, Nanos{1000}, Nanos{1900}}};
  const auto rows = compare(p, simulate(p, UnitCost()), {{1, &graph}}, records);
  ASSERT_EQ(rows.size(), 3u);  // release takes no time
  EXPECT_EQ(rows[0].label, "gather a");
  EXPECT_EQ(rows[0].predicted, Nanos{512});
  EXPECT_FALSE(rows[0].measured.has_value());
  EXPECT_EQ(rows[1].label, "wait a");
  EXPECT_EQ(rows[2].label, "run f");
  EXPECT_EQ(rows[2].measured, Nanos{800});
  EXPECT_EQ(rows[2].samples, 2);
  EXPECT_DOUBLE_EQ(*rows[2].ratio(), 800.0 / 600.0);
  EXPECT_TRUE(contains(compare_table(rows), "inference 0  2  run f"));
}

TEST(Compare, AddsUpKinds) {
  StepProgram p = program();
  p.sections[0].graph = 0;
  const StepProgram graph = program();
  const std::vector<Record> records = {{1, 0, 1, Nanos{0}, Nanos{40}},
                                       {1, 0, 2, Nanos{100}, Nanos{800}}};
  const auto kinds = compare_kinds(compare(p, simulate(p, UnitCost()), {{1, &graph}}, records));
  ASSERT_EQ(kinds.size(), 3u);
  EXPECT_EQ(kinds[0].kind, "gather");
  EXPECT_EQ(kinds[0].samples, 0);
  EXPECT_EQ(kinds[1].kind, "wait");
  EXPECT_EQ(kinds[1].predicted, Nanos{512});
  EXPECT_EQ(kinds[1].measured, Nanos{40});
  EXPECT_EQ(kinds[2].kind, "run");
  EXPECT_EQ(kinds[2].executions, 1);
  EXPECT_EQ(kinds[2].measured, Nanos{700});
  EXPECT_TRUE(contains(kind_table(kinds), "run     600 ns     1   700 ns    1   +100 ns"))
      << kind_table(kinds);
}

TEST(Compare, UnknownRecordsAreErrors) {
  const StepProgram p = program();
  const RecordNames names({{1, &p}});
  EXPECT_THROW(names.find({2, 0, 0, {}, {}}), UserError);
  EXPECT_THROW(names.find({1, 1, 0, {}, {}}), UserError);
  EXPECT_THROW(names.find({1, 0, 4, {}, {}}), UserError);
}

TEST(Table, AlignsColumns) {
  Table table({"a", "long"});
  table.add({"wide cell", "x"});
  EXPECT_EQ(table.text(), "a          long\nwide cell  x\n");
}

}  // namespace
}  // namespace deepcompile::report_test
