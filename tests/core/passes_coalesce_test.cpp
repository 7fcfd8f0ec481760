// SPDX-License-Identifier: Apache-2.0
// What starts together. Times are those of unit_cost.h.
#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>

#include "analysis/memory_timeline.h"
#include "ir/verifier.h"
#include "passes/coalesce.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::passes_coalesce_test {
namespace {

// The instructions of a section of `params` parameters a, b, ..., one a line.
std::string coalesced(const std::string& instrs, int params = 3, const std::string& numel = "128") {
  std::string text = "step together world=2\nvalue x0 4B\nvalue y0 4B\n";
  std::string reads, gradients;
  for (int p = 0; p < params; ++p) {
    const std::string name(1, static_cast<char>('a' + p));
    text += "param " + name + " f32 " + numel + "\nvalue g." + name + " 512B grad=" + name + "\n";
    reads += ", " + name;
    gradients += (p == 0 ? "g." : ", g.") + name;
  }
  text += "region f time=1ns (x0" + reads + ") -> (y0)\n";
  text += "region b time=1ns (x0) -> (" + gradients + ")\n";
  text += "forward 0 (x0) -> ()\n" + instrs + "end\n";
  StepProgram program = parse_program(text);
  coalesce(&program);
  std::string out = sections_text(program);
  out = out.substr(out.find('\n') + 1);
  return out.substr(0, out.find("end"));
}

TEST(Coalesce, ComputeFirstThenTransfersThenTheLastWait) {
  EXPECT_EQ(coalesced("  gather c\n  update a\n  gather a\n  update b\n  gather b\n"
                      "  wait a\n  wait c\n  wait b\n  run f\n"),
            "  gather c\n  update a\n  update b\n  gather a\n  gather b\n"
            "  wait b\n  wait a\n  wait c\n  run f\n");
  EXPECT_EQ(coalesced("  run b\n  reduce a (g.a)\n  reduce b (g.b)\n  accumulate c\n"
                      "  reduce c (g.c)\n"),
            "  run b\n  reduce a (g.a)\n  accumulate c\n  reduce b (g.b)\n  reduce c (g.c)\n");
}

TEST(Coalesce, WhatConcernsAParameterStaysBehindItsTransfer) {
  const std::string instrs = "  run b\n  reduce a (g.a)\n  accumulate a\n  update a\n  gather a\n";
  EXPECT_EQ(coalesced(instrs), instrs);
}

TEST(Coalesce, ASectionBeginsWithFewAndNoGroupHasMoreThanEight) {
  std::string instrs;
  for (int p = 0; p < 26; ++p) {
    const std::string name(1, static_cast<char>('a' + p));
    instrs += "  update " + name + "\n  gather " + name + "\n";
  }
  const std::string out = coalesced(instrs, 26);
  std::vector<int> groups;  // gathers in a row
  bool gathers = false;
  std::istringstream lines(out);
  for (std::string line; std::getline(lines, line);) {
    const bool gather = line.find("gather") != std::string::npos;
    if (gather && !gathers) groups.push_back(0);
    if (gather) ++groups.back();
    gathers = gather;
  }
  EXPECT_EQ(groups, (std::vector<int>{1, 2, 4, 8, 8, 3}));
}

TEST(Coalesce, LargeTransfersDoNotWaitForEachOthersUpdates) {
  const std::string instrs =
      "  update a\n  gather a\n  update b\n  gather b\n  update c\n  gather c\n"
      "  update d\n  gather d\n";
  const std::string first = "  update a\n  gather a\n  update b\n";
  EXPECT_EQ(coalesced(instrs, 4), first +
                                      "  update c\n  gather b\n  gather c\n"
                                      "  update d\n  gather d\n");
  // 100 MiB each: b and c go together, four do not.
  EXPECT_EQ(coalesced(instrs, 4, "26214400"), coalesced(instrs, 4));
  // 200 MiB each.
  EXPECT_EQ(coalesced(instrs, 4, "52428800"), instrs);
}

// The sum of a's two gradients, in full precision, comes in while the gradient of b is there.
TEST(Coalesce, ASectionThatWouldNeedMoreMemoryStays) {
  const StepProgram before = parse_program(R"(step s world=2 reduce=bf16
param a bf16 4096
param b bf16 64
value x 64B
value l 4B
value t 4B
value g.a 8KiB grad=a
value g.b 64KiB grad=b
value y 64B
value m 4B
value u 4B
value h.a 8KiB grad=a
region f0 (x) -> (l)
region f1 (y) -> (m)
region b0 (t) -> (g.a)
region b1 (t) -> (g.b)
region b2 (u) -> (h.a)
forward 0 (x) -> (l)
  run f0
end
backward 0 (t) -> ()
  run b0
  reduce a (g.a)
  run b1
  reduce b (g.b)
  accumulate a
  accumulate b
end
forward 1 (y) -> (m)
  run f1
end
backward 1 (u) -> ()
  run b2
  reduce a (h.a)
  accumulate a
end
update
  update a
  update b
end
)");
  StepProgram after = before;
  coalesce(&after);
  EXPECT_EQ(sections_text(after), sections_text(before));
}

TEST(Coalesce, RandomProgramsKeepTheirTransfersOrderAndPeak) {
  const UnitCost costs;
  int moved = 0;
  for (uint32_t seed = 0; seed < 150; ++seed) {
    StepProgram before = random_program(seed);
    run_pipeline(before, PassRegistry::with_builtins(),
                 {"zero3_compile", "selective_gather", "prefetch", "place_optimizer"},
                 planned_for(costs, Bytes{int64_t{1} << 40}));
    StepProgram after = before;
    run_pipeline(after, PassRegistry::with_builtins(), {"coalesce"}, planned_for(costs));
    ASSERT_EQ(error_of([&] { verify_plan(after); }), "no error") << seed;
    ASSERT_EQ(collective_order(before), collective_order(after)) << seed;
    ASSERT_LE(memory_timeline(after).peak, memory_timeline(before).peak) << seed;
    moved += sections_text(before) != sections_text(after) ? 1 : 0;
  }
  EXPECT_GT(moved, 50);
}

}  // namespace
}  // namespace deepcompile::passes_coalesce_test
