// SPDX-License-Identifier: Apache-2.0
// The order of transfers. Times are those of unit_cost.h: 1 ns a byte on the
// link, 10 ns an accumulation.
#include <gtest/gtest.h>

#include <algorithm>

#include "analysis/memory_timeline.h"
#include "ir/verifier.h"
#include "passes/order_link.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::passes_order_link_test {
namespace {

// b's reduction (512 ns) stands before the gather of a (512 ns), which the next
// run waits for.
constexpr const char* kReduceFirst = R"(
step order world=2
param a f32 128
param b f32 128
value x 100B
value s 100B
value t 4B
value d 100B
value g.a 512B grad=a
value g.b 512B grad=b
region f time=100ns (x) -> (s)
region bb time=100ns (t, s, b) -> (d, g.b)
region ba time=2000ns (d, a) -> (g.a)
forward 0 (x) -> ()
  run f
end
backward 0 (t) -> ()
  gather b
  wait b
  run bb
  release b
  reduce b (g.b)
  gather a
  wait a
  run ba
  release a
  reduce a (g.a)
  accumulate b
  accumulate a
end
)";

StepProgram ordered(const std::string& text, const PipelineOptions& options,
                    OrderLinkOptions pass = {}) {
  StepProgram program = parse_program(text);
  const OrderLink order(pass);
  run_pipeline(program, {&order}, options);
  return program;
}

TEST(OrderLink, WhatIsWaitedForFirstGoesFirst) {
  const UnitCost costs;
  const StepProgram program = ordered(kReduceFirst, planned_for(costs));
  const std::string text = sections_text(program);
  EXPECT_LT(text.find("gather a"), text.find("reduce b")) << text;
  // Before, run ba waits for both transfers: f 100, gather b 512, bb 100, reduce b 512,
  // gather a 512, ba 2000, reduce a 512 (accumulate b beside it), accumulate a 10.
  EXPECT_EQ(simulate(parse_program(kReduceFirst), costs).time, Nanos{4258});
  EXPECT_EQ(simulate(program, costs).time, Nanos{4258 - 512});
  EXPECT_EQ(reasons_for(program, "order_link", ""),
            (std::vector<std::string>{"backward 0: gathers pass reductions that are waited for "
                                      "later, 0 runs behind them at most: saves 512 ns",
                                      "step 4.26 us -> 3.75 us, peak 3.85 KiB"}));
}

// Updates take 1000 ns each, the gather of e 512 and that of w 1024. The first run needs both.
constexpr const char* kLongUpdateFirst = R"(
step start world=2
param e bf16 256
param w f32 256
value n 8B
value x 100B
value t 4B
value g.e 512B grad=e
value g.w 1024B grad=w
region f time=2000ns (n, e, w) -> (x)
region b time=2000ns (t, x, w) -> (g.e, g.w)
forward 0 (n) -> ()
  update e
  gather e
  update w
  gather w
  wait e
  wait w
  run f
  release e
  release w
end
backward 0 (t) -> ()
  gather w
  wait w
  run b
  release w
  reduce w (g.w)
  reduce e (g.e)
  accumulate w
  accumulate e
end
update
  defer e
  defer w
end
)";

TEST(OrderLink, ALongUpdateLetsTheFirstGathersPass) {
  UnitCost costs;
  costs.update = Nanos{1000};
  const StepProgram before = parse_program(kLongUpdateFirst);
  const StepProgram program = ordered(kLongUpdateFirst, planned_for(costs));
  const std::string text = sections_text(program);
  EXPECT_LT(text.find("gather w"), text.find("update e")) << text;
  EXPECT_LT(text.find("update e"), text.find("gather e")) << text;
  // Before, f starts when w has arrived, at 2 x 1000 + 1024, and now when e has, at 1000 + 1024 +
  // 512.
  EXPECT_EQ(simulate(program, costs).time, simulate(before, costs).time - Nanos{488});
  verify(program);
}

// Where it is waited for before the others are issued, or its states leave behind it, it stays.
TEST(OrderLink, ALongUpdatePassesNothingOfItsParameter) {
  UnitCost costs;
  costs.update = Nanos{1000};
  const std::string waited = replaced(replaced(kLongUpdateFirst, "  wait e\n", ""), "  gather e\n",
                                      "  gather e\n  wait e\n");
  const std::string moved =
      replaced(kLongUpdateFirst, "  update e\n",
               "  reload_states e\n  await_states e\n  update e\n  offload_states e\n");
  for (const std::string& text : {waited, moved}) {
    EXPECT_EQ(sections_text(ordered(text, planned_for(costs))), sections_text(parse_program(text)));
  }
}

// The accumulation of b stops compute for the link; c's run could go on.
TEST(OrderLink, AccumulationsDoNotStopCompute) {
  const UnitCost costs;
  std::string text = replaced(kReduceFirst, "time=2000ns", "time=50ns");
  text = replaced(text, "  gather a\n  wait a\n", "");
  text = replaced(text, "  gather b\n  wait b\n", "  gather a\n  gather b\n  wait a\n  wait b\n");
  text = replaced(text, "  run ba\n", "  accumulate b\n  run ba\n");
  text = replaced(text, "  reduce a (g.a)\n  accumulate b\n", "  reduce a (g.a)\n");
  const StepProgram program = ordered(text, planned_for(costs));
  const std::string out = sections_text(program);
  EXPECT_LT(out.find("run ba"), out.find("accumulate b")) << out;
  EXPECT_LT(simulate(program, costs).time, simulate(parse_program(text), costs).time);
}

TEST(OrderLink, StaysWithinTheBudget) {
  const UnitCost costs;
  // The gather of a beside b's gradient needs more than the order before.
  const Bytes before = simulate(parse_program(kReduceFirst), costs).peak;
  const StepProgram program = ordered(kReduceFirst, planned_for(costs, before));
  EXPECT_LE(simulate(program, costs).peak, before);
}

TEST(OrderLink, ChangesNothingWithoutAMachineOrSimulations) {
  const UnitCost costs;
  const std::string before = sections_text(parse_program(kReduceFirst));
  EXPECT_EQ(sections_text(ordered(kReduceFirst, {})), before);
  EXPECT_EQ(sections_text(ordered(kReduceFirst, planned_for(costs), {.simulations = 0})), before);
}

TEST(OrderLink, RandomProgramsKeepTheirCollectives) {
  UnitCost costs;
  costs.slowdown = 1.2;
  int faster = 0;
  for (uint32_t seed = 0; seed < 150; ++seed) {
    StepProgram before = random_program(seed);
    run_pipeline(before, PassRegistry::with_builtins(), {"zero3_compile", "prefetch"},
                 planned_for(costs));
    StepProgram after = before;
    run_pipeline(after, PassRegistry::with_builtins(), {"order_link"}, planned_for(costs));
    ASSERT_EQ(error_of([&] { verify_plan(after); }), "no error") << seed;
    auto one = collective_order(before), two = collective_order(after);
    std::sort(one.begin(), one.end());
    std::sort(two.begin(), two.end());
    ASSERT_EQ(one, two) << seed;
    const Nanos time = simulate(before, costs).time;
    ASSERT_LE(simulate(after, costs).time, time) << seed;
    faster += simulate(after, costs).time < time;
  }
  EXPECT_GT(faster, 2);
}

}  // namespace
}  // namespace deepcompile::passes_order_link_test
