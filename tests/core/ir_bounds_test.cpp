// SPDX-License-Identifier: Apache-2.0
// Numbers that are too large to be added or multiplied, and what is said twice: errors, all of
// them, before anything is computed.
#include <gtest/gtest.h>

#include <ctime>

#include "cost/measured_costs.h"
#include "ir/text.h"
#include "ir/verifier.h"
#include "sim/clock.h"
#include "sim/simulator.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::ir_bounds_test {
namespace {

std::string parsed(const std::string& lines, const std::string& header = "step s world=2") {
  return error_of([&] { parse_program(header + "\n" + lines, "t"); });
}

std::string table(const std::string& text) {
  return error_of([&] { parse_cost_table(text, "t.json"); });
}

TEST(Bounds, OneRegion) {
  const std::string most = " is the most there can be.";
  EXPECT_EQ(parsed("region r time=9000000000s () -> ()"),
            "[ir] t:2:8: region 'r': time in ns is 9000000000000000000, and 86400000000000" + most);
  EXPECT_EQ(parsed("region r flops=9000000000000000000 () -> ()"),
            "[ir] t:2:8: region 'r': flops is 9000000000000000000, and 1152921504606846976" + most);
  EXPECT_EQ(parsed("region r moved=8000000TiB () -> ()"),
            "[ir] t:2:8: region 'r': moved is 8796093022208000000, and 4503599627370496" + most);
  EXPECT_EQ(parsed("region r time=86400s flops=1000000000000000000 moved=1TiB () -> ()"),
            "no error");
}

// 2^45 rows of 2^48 elements; in a program that is given more ranks later, too.
TEST(Bounds, RowsOfAllRanks) {
  EXPECT_EQ(parsed("param e f32 281474976710656\nvalue ids 256TiB rows=e row=281474976710656"),
            "[ir] t:3:7: value 'ids': numbers rows of e, which are more elements on 2 ranks than "
            "the 281474976710656 there can be. Correct the value's size, or the row.");
  StepProgram program = parse_program(
      "step s world=2\nparam e f32 1024\nvalue ids 1TiB rows=e row=4\nvalue h 4B\n"
      "region f (ids, e) -> (h)\nforward 0 (ids) -> (h)\n  run f\nend\n");
  EXPECT_EQ(error_of([&] { verify(program); }), "no error");
  program.world = 1 << 20;
  EXPECT_EQ(error_of([&] { verify(program); }),
            "[ir] s: value ids numbers more rows of e than 1048576 ranks can exchange. Correct "
            "it.");
}

TEST(Bounds, TheProgramInAll) {
  const auto verified = [](const std::string& lines, const std::string& header) {
    return error_of([&] { verify(parse_program(header + "\n" + lines)); });
  };
  const std::string correct = " than the 4503599627370496 there can be. Correct their sizes.";
  std::string values, params, regions;
  for (int i = 0; i < 17; ++i) {
    values += "value v" + std::to_string(i) + " 256TiB\n";
    params += "param p" + std::to_string(i) + " f32 281474976710656\n";
  }
  for (int i = 0; i < 52; ++i) {
    regions += "region r" + std::to_string(i) + " time=86400s () -> ()\n";
  }
  EXPECT_EQ(verified(values, "step s world=1"), "[ir] s: has more bytes of values" + correct);
  EXPECT_EQ(verified(params, "step s world=1"),
            "[ir] s: has more elements of parameters" + correct);
  EXPECT_EQ(verified(regions, "step s world=1 accumulation=65536"),
            "[ir] s: its regions take more than nine years a step. Correct their times.");
}

TEST(Bounds, CostTables) {
  EXPECT_EQ(table(R"({"world": 2, "gather": [[0, 9223372036854775807]]})"),
            "[cost] t.json: gather[0][1]: must be from 0 to 86400000000000, is "
            "9223372036854775807.");
  EXPECT_EQ(table(R"({"world": 2, "gather": [[9223372036854775807, 1]]})"),
            "[cost] t.json: gather[0][0]: must be from 0 to 4503599627370496, is "
            "9223372036854775807.");
  EXPECT_EQ(table(R"({"world": 2, "run_overhead_ns": 86400000000001})"),
            "[cost] t.json: run_overhead_ns: must be from 0 to 86400000000000, is "
            "86400000000001.");
  EXPECT_EQ(table(R"({"world": 2, "section_overhead_ns": {"forward": 86400000000001}})"),
            "[cost] t.json: section_overhead_ns.forward: must be from 0 to 86400000000000, is "
            "86400000000001.");
  const Curve steep({{Bytes{0}, Nanos{0}}, {Bytes{1}, kLongestTime}}, "[cost] test");
  EXPECT_EQ(steep.at(Bytes{kMostInAll}), kLongestTime);
  EXPECT_EQ(error_of([] {
              Curve({{Bytes{1}, Nanos{INT64_MAX}}}, "[cost] test");
            }),
            "[cost] test: point 0 is of more than 4 PiB, or takes more than a day. Correct it.");
  CostTable slow;
  slow.run_overhead = Nanos{INT64_MAX};
  EXPECT_EQ(error_of([&] { MeasuredCosts(Machine{}, slow); }),
            "[cost] cost table: an overhead is 9223372036854775807 ns. Give one from 0 to "
            "86400000000000.");
}

// Each of these copies is allowed; all together they are years.
TEST(Bounds, TheClock) {
  const std::string why =
      "[cost] the step takes years by the times of its regions, of the machine and of the cost "
      "table. Correct them.";
  const auto run = [](auto work) {
    Clock clock(100, {.to_device = kLeastBeside, .to_host = kLeastBeside});
    return error_of([&] {
      for (int i = 0; i < 100'000; ++i) work(clock);
      clock.end();
    });
  };
  EXPECT_EQ(run([](Clock& clock) { clock.kernel(kLongestTime); }), why);
  EXPECT_EQ(run([](Clock& clock) { clock.idle(kLongestTime); }), why);
  for (const Resource queue : {Resource::kLink, Resource::kToHost, Resource::kToDevice}) {
    EXPECT_EQ(run([&](Clock& clock) { clock.transfer(queue, kLongestTime); }), why);
    EXPECT_EQ(run([&](Clock& clock) { clock.transfer(queue, kLongestStep); }), why);
  }
  EXPECT_EQ(run([](Clock& clock) { clock.kernel(kLongestStep); }), why);
}

TEST(Bounds, MicroBatches) {
  EXPECT_EQ(parsed("", "step s world=2 accumulation=65536"), "no error");
  EXPECT_EQ(parsed("", "step s world=2 accumulation=2147483647"),
            "[ir] t:1:29: accumulation is 2147483647. Give at most 65536.");
  StepProgram program = parse_program(kTwoLayers);
  program.accumulation = 65537;
  EXPECT_EQ(error_of([&] { verify(program); }),
            "[ir] two: accumulation is 65537. Give at most 65536.");
}

TEST(Twice, IsAnError) {
  const std::string keep = " in this line. Keep one of them.";
  EXPECT_EQ(parsed("", "step s world=2 world=3"), "[ir] t:1:16: a second world" + keep);
  EXPECT_EQ(parsed("", "step s world=2 clip clip"), "[ir] t:1:21: a second clip" + keep);
  EXPECT_EQ(parsed("param a f32 4 whole replicated"), "[ir] t:2:21: a second placement" + keep);
  EXPECT_EQ(parsed("param a f32 4 frozen frozen"), "[ir] t:2:22: a second frozen" + keep);
  EXPECT_EQ(parsed("param a f32 4\nvalue v 4B grad=a grad=a"), "[ir] t:3:19: a second grad" + keep);
  EXPECT_EQ(parsed("param a f32 4\nvalue v 8B rows=a row=4 row=2"),
            "[ir] t:3:25: a second row" + keep);
  EXPECT_EQ(parsed("region r time=1ns once time=2ns () -> ()"),
            "[ir] t:2:24: a second time" + keep);
  EXPECT_EQ(parsed("param a f32 4 whole frozen\nparam b f32 4 whole frozen"), "no error");
}

// Graphs of 40 values each that are away between forward and backward.
TEST(ManyGraphs, AreVerifiedInTimeThatGrowsAsThey) {
  constexpr int kGraphs = kSanitized ? 40 : 400;
  std::string values, regions, forwards, backwards;
  for (int g = 0; g < kGraphs; ++g) {
    const std::string n = std::to_string(g);
    std::string list;
    for (int i = 0; i < 40; ++i) {
      const std::string name = "h" + n + "." + std::to_string(i);
      list += (i == 0 ? "" : ", ") + name;
      values.append("value ").append(name).append(" 1KiB\n");
    }
    values += "value x" + n + " 1KiB\nvalue d" + n + " 1KiB\n";
    regions += "region f" + n + " (x" + n + ") -> (" + list + ")\n";
    regions += "region b" + n + " (d" + n + ", " + list + ") -> ()\n";
    forwards +=
        "forward " + n + " (x" + n + ") -> ()\n  run f" + n + "\n  offload (" + list + ")\nend\n";
    backwards = "backward " + n + " (d" + n + ") -> ()\n  evict (" + list + ")\n  reload (" + list +
                ")\n  await (" + list + ")\n  run b" + n + "\nend\n" + backwards;
  }
  const StepProgram program =
      parse_program("step s world=1\n" + values + regions + forwards + backwards);
  const std::clock_t start = std::clock();
  verify_plan(program);
  EXPECT_LT(std::clock() - start, CLOCKS_PER_SEC / 4);
}

}  // namespace
}  // namespace deepcompile::ir_bounds_test
