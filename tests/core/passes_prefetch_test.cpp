// SPDX-License-Identifier: Apache-2.0
// Expected times and sizes are worked out by hand on the machine of
// unit_cost.h: the link moves 1 byte a ns, an update takes 50 ns, an
// accumulation 10. A parameter of 128 f32 elements is 512 B: a gather or a
// reduction takes 512 ns.
#include <gtest/gtest.h>

#include "analysis/memory_timeline.h"
#include "ir/verifier.h"
#include "passes/prefetch.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::passes_prefetch_test {
namespace {

constexpr const char* kSerial = R"(
step two world=2
param a f32 128 frozen
param b f32 128 frozen
value x 100B
value y 200B
value z 300B
region fa workspace=40B time=600ns (x, a) -> (y)
region fb time=600ns (y, b) -> (z)
inference 0 (x) -> (z)
  gather a
  wait a
  run fa
  release a
  gather b
  wait b
  run fb
  release b
end
)";

constexpr const char* kPrefetched =
    "inference 0\n"
    "  gather a\n  gather b\n  wait a\n  run fa\n  release a\n  wait b\n  run fb\n  release b\n";

StepProgram prefetched(const std::string& text, const PipelineOptions& options,
                       PrefetchOptions pass = {}) {
  StepProgram program = parse_program(text);
  const Prefetch prefetch(std::move(pass));
  run_pipeline(program, {&prefetch}, options);
  return program;
}

TEST(Prefetch, HidesAGatherBehindTheRunBefore) {
  const UnitCost costs;
  const StepProgram program = prefetched(kSerial, planned_for(costs));
  EXPECT_EQ(sections_text(program), kPrefetched);
  // Before: 512 + 600 + 512 + 600. After: gather b 512-1024 beside run fa 512-1112.
  EXPECT_EQ(simulate(parse_program(kSerial), costs).time, Nanos{2224});
  EXPECT_EQ(simulate(program, costs).time, Nanos{1712});
  EXPECT_EQ(reasons_for(program, "prefetch", "b"),
            std::vector<std::string>{"inference 0: gathered ahead of 1 run: 512 B, a transfer of "
                                     "512 ns beside 600 ns of compute"});
  // Limits of 1024 and 512 B give the same program; the smaller one is kept.
  EXPECT_EQ(reasons_for(program, "prefetch", ""),
            (std::vector<std::string>{
                "inference 0: 1 gather earlier, at most 512 B (512B) gathered ahead of use",
                "peak 1.83 KiB, step 2.22 us -> 1.71 us"}));
}

TEST(Prefetch, StaysWithinTheBudget) {
  const UnitCost costs;
  // Shards 256 + 256, a 512, x 100, y 200, workspace 40 in run fa: 1364; with b 1876.
  // The peak before is run fb's: 512 + b 512 + y 200 + z 300 = 1524.
  EXPECT_EQ(sections_text(prefetched(kSerial, planned_for(costs, Bytes{1876}))), kPrefetched);
  const StepProgram tight = prefetched(kSerial, planned_for(costs, Bytes{1875}));
  EXPECT_EQ(sections_text(tight), sections_text(parse_program(kSerial)));
  EXPECT_EQ(reasons_for(tight, "prefetch", "").back(),
            "peak 1.49 KiB of 1.83 KiB, step 2.22 us: no earlier gather shortens it");
  EXPECT_EQ(
      error_of([&] { prefetched(kSerial, planned_for(costs, Bytes{1523})); }),
      "[passes] prefetch: the program needs 1.49 KiB at `run fb` in inference 0, and the memory "
      "budget is 1.49 KiB, 1 B less, before anything is gathered earlier or kept. Raise the "
      "budget, use more ranks, or a smaller batch.");
}

constexpr const char* kThree = R"(
step three world=2
param a f32 128 frozen
param b f32 128 frozen
param c f32 128 frozen
value x 100B
value y 100B
value z 100B
value w 100B
region fa time=600ns (x, a) -> (y)
region fb time=100ns (y, b) -> (z)
region fc time=100ns (z, c) -> (w)
inference 0 (x) -> (w)
  gather a
  wait a
  run fa
  release a
  gather b
  wait b
  run fb
  release b
  gather c
  wait c
  run fc
  release c
end
)";

TEST(Prefetch, GathersNoMoreAheadThanTheLimit) {
  const auto limited = [](int64_t bytes) {
    return sections_text(prefetched(kThree, {}, {.ahead = Bytes{bytes}}));
  };
  EXPECT_EQ(limited(512),
            "inference 0\n  gather a\n  gather b\n  wait a\n  run fa\n  release a\n"
            "  gather c\n  wait b\n  run fb\n  release b\n  wait c\n  run fc\n  release c\n");
  EXPECT_EQ(limited(1024),
            "inference 0\n  gather a\n  gather b\n  gather c\n  wait a\n  run fa\n  release a\n"
            "  wait b\n  run fb\n  release b\n  wait c\n  run fc\n  release c\n");
  EXPECT_EQ(limited(511), sections_text(parse_program(kThree)));
}

TEST(Prefetch, AGatherThatDoesNotFitYetWaitsUntilItDoes) {
  const UnitCost costs;
  // Without prefetch run fa has the shards 768, a 512, x and y: 1480, and so have the others.
  // 2000 hold one more parameter, 2504 two: c cannot be there during run fa, but during fb.
  const StepProgram program =
      prefetched(kThree, planned_for(costs, Bytes{2000}), {.simulations = 1});
  EXPECT_EQ(memory_timeline(program).peak, Bytes{1992});
  EXPECT_EQ(sections_text(program),
            "inference 0\n  gather a\n  gather b\n  wait a\n  run fa\n  release a\n"
            "  gather c\n  wait b\n  run fb\n  release b\n  wait c\n  run fc\n  release c\n");
}

constexpr const char* kBackward = R"(
step back world=2
param a f32 128
param b f32 128
value x 100B
value s 100B
value loss 4B
value t 4B
value d 100B
value g.a 512B grad=a
value g.b 512B grad=b
region f time=100ns (x) -> (s, loss)
region bb time=1000ns (t, s, b) -> (d, g.b)
region ba time=1000ns (d, x, a) -> (g.a)
forward 0 (x) -> (loss)
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

TEST(Prefetch, GathersOvertakeReductions) {
  const UnitCost costs;
  const StepProgram program = prefetched(kBackward, planned_for(costs));
  EXPECT_EQ(sections_text(program),
            "forward 0\n  run f\nbackward 0\n  gather b\n  gather a\n  wait b\n  run bb\n"
            "  release b\n  reduce b (g.b)\n  wait a\n  run ba\n  release a\n  reduce a (g.a)\n"
            "  accumulate b\n  accumulate a\n");
  // Before: f to 100, gather b to 612, bb to 1612, reduce b to 2124, gather a to 2636, ba to
  // 3636, reduce a to 4148, accumulate a to 4158.
  EXPECT_EQ(simulate(parse_program(kBackward), costs).time, Nanos{4158});
  // After: gather a 612-1124 beside bb, ba 1612-2612, reduce a to 3124, accumulate a to 3134.
  EXPECT_EQ(simulate(program, costs).time, Nanos{3134});
}

TEST(Prefetch, TheOrderOfCollectivesIsAFunctionOfParametersAndLimits) {
  const UnitCost costs;
  const PrefetchOptions agreed{.agreed = {Bytes{0}, Bytes{512}}};
  const StepProgram one = prefetched(kBackward, planned_for(costs), agreed);
  // Another sequence length: other times, other sizes, and a budget that is just enough.
  std::string text = replaced(kBackward, "time=1000ns", "time=3ns");
  text = replaced(text, "value s 100B", "value s 9000B");
  const StepProgram loose = prefetched(text, planned_for(costs), agreed);
  const StepProgram tight =
      prefetched(text, planned_for(costs, memory_timeline(loose).peak), agreed);
  EXPECT_EQ(order_difference(collective_order(one), collective_order(loose)), std::nullopt);
  EXPECT_EQ(order_difference(collective_order(one), collective_order(tight)), std::nullopt);
  // Not even 1 B less: then gather a waits for the end of run bb, and is still ahead of reduce b.
  const StepProgram late =
      prefetched(text, planned_for(costs, memory_timeline(loose).peak - Bytes{1}), agreed);
  EXPECT_EQ(order_difference(collective_order(one), collective_order(late)), std::nullopt);
  EXPECT_NE(sections_text(late).find("  run bb\n  gather a\n  release b\n  reduce b (g.b)\n"),
            std::string::npos);
  // With a large g.b, reduce b is the peak, and a has no place before it.
  text = replaced(kBackward, "value g.b 512B", "value g.b 4KiB");
  const Bytes peak = memory_timeline(parse_program(text)).peak;
  const std::string message = error_of([&] { prefetched(text, planned_for(costs, peak), agreed); });
  EXPECT_NE(message.find("the agreed limit of 512 B takes backward 0 above the memory budget"),
            std::string::npos)
      << message;
  EXPECT_NE(error_of([&] {
              prefetched(text, {}, {.agreed = {Bytes{1}}});
            }).find("1 agreed limits for 2 sections"),
            std::string::npos);
}

TEST(Prefetch, AGatherStaysBehindTheUpdateThatMakesItStale) {
  const std::string text = R"(
step update world=2
param n f32 128 whole
param a f32 128
value x 4B
value y 4B
region f time=100ns (x, a, n) -> (y)
inference 0 (x) -> (y)
  gather a
  wait a
  run f
  release a
end
update
  update n
  update a
  gather n
  wait n
end
)";
  const UnitCost costs;
  const StepProgram program = prefetched(text, planned_for(costs));
  EXPECT_NE(sections_text(program).find("update\n  update n\n  gather n\n  update a\n  wait n\n"),
            std::string::npos);
  // Before: gather a 512, f 612, updates 712, gather n 1224. After: gather n 662-1174.
  EXPECT_EQ(simulate(parse_program(text), costs).time, Nanos{1224});
  EXPECT_EQ(simulate(program, costs).time, Nanos{1174});
}

TEST(Prefetch, NeverPassesTheReleaseOfItsOwnParameter) {
  const std::string text =
      replaced(replaced(kSerial, "region fb time=600ns (y, b)", "region fb time=600ns (y, a)"),
               "  gather b\n  wait b\n  run fb\n  release b\n",
               "  gather a\n  wait a\n  run fb\n  release a\n");
  const UnitCost costs;
  const StepProgram program = prefetched(text, planned_for(costs));
  EXPECT_EQ(sections_text(program), sections_text(parse_program(text)));
}

TEST(Prefetch, NeedsGathersAndNoMachine) {
  EXPECT_NE(error_of([&] { prefetched(kTwoLayers, {}); }).find("needs gathers_placed"),
            std::string::npos);
  const StepProgram program = prefetched(kSerial, {});
  EXPECT_EQ(sections_text(program), kPrefetched);
  EXPECT_EQ(reasons_for(program, "prefetch", "").back(), "peak 1.83 KiB, not simulated");
}

// --- random programs ---------------------------------------------------------

StepProgram random_zero3(uint32_t seed) {
  StepProgram program = random_program(seed);
  std::mt19937 random(seed);
  for (Region& region : program.regions) region.time = Nanos{pick(random, 0, 20000)};
  run_pipeline(program, PassRegistry::with_builtins(), {"zero3_compile"});
  return program;
}

std::vector<std::string> gathers_of(const StepProgram& program) {
  std::vector<std::string> order = collective_order(program);
  std::erase_if(
      order, [](const std::string& call) { return call.find(": gather ") == std::string::npos; });
  return order;
}

bool has_gathers(const StepProgram& program) {
  return facts_of(program).contains(Fact::kGathersPlaced);
}

TEST(RandomPrefetch, IsNeverSlowerNorAboveTheBudget) {
  int faster = 0, tried = 0;
  for (uint32_t seed = 0; seed < 400; ++seed) {
    const StepProgram before = random_zero3(seed);
    if (!has_gathers(before)) continue;
    ++tried;
    UnitCost costs;
    costs.slowdown = 1 + 0.25 * (seed % 3);
    std::mt19937 random(seed);
    const Bytes budget = memory_timeline(before).peak + Bytes{pick(random, 0, 40000)};
    StepProgram after = before;
    run_pipeline(after, PassRegistry::with_builtins(), {"prefetch"}, planned_for(costs, budget));
    ASSERT_EQ(error_of([&] { verify_plan(after); }), "no error") << seed;
    ASSERT_LE(memory_timeline(after).peak, budget) << seed;
    ASSERT_LE(simulate(after, costs).time, simulate(before, costs).time) << seed;
    faster += simulate(after, costs).time < simulate(before, costs).time ? 1 : 0;
    ASSERT_EQ(work_of(after), work_of(before)) << seed;
    ASSERT_EQ(gathers_of(after), gathers_of(before)) << seed;
    StepProgram again = before;
    run_pipeline(again, PassRegistry::with_builtins(), {"prefetch"}, planned_for(costs, budget));
    ASSERT_EQ(print(again), print(after)) << seed;
  }
  EXPECT_GT(tried, 300);
  EXPECT_GT(faster, tried / 2);
}

// What one rank agreed on gives the others its order, whatever their sizes.
TEST(Prefetch, TakesALimitASection) {
  const UnitCost costs;
  const StepProgram one = prefetched(kSerial, {}, {.most = {Bytes{512}}});
  EXPECT_EQ(sections_text(one), kPrefetched);
  const StepProgram unmoved = prefetched(kSerial, {}, {.most = {Bytes{-1}}});
  EXPECT_EQ(sections_text(unmoved), sections_text(parse_program(kSerial)));
  // Unlike `agreed`, a limit that does not fit the budget is lowered.
  const StepProgram tight =
      prefetched(kSerial, planned_for(costs, Bytes{1875}), {.most = {Bytes{512}}});
  EXPECT_EQ(sections_text(tight), sections_text(parse_program(kSerial)));
}

// A gather applies what was deferred, so it stays behind the update or defer.
TEST(Prefetch, GathersStayBehindTheirUpdate) {
  const std::string text =
      replaced(replaced(kSerial, "128 frozen", "128"), "  gather b\n", "  update b\n  gather b\n");
  const std::string forward = replaced(replaced(text, "inference 0", "forward 0"), "release b\nend",
                                       "release b\nend\nupdate\n  update a\n  defer b\nend");
  const std::string out = sections_text(prefetched(forward, {}));
  EXPECT_LT(out.find("update b"), out.find("gather b")) << out;
}

TEST(RandomPrefetch, KeepsTheOrderWhateverTimesSizesAndBudgets) {
  for (uint32_t seed = 0; seed < 200; ++seed) {
    const StepProgram plain = random_zero3(seed);
    if (!has_gathers(plain)) continue;
    std::mt19937 random(seed);
    PrefetchOptions options;
    for (size_t s = 0; s < plain.sections.size(); ++s) {
      options.agreed.push_back({pick(random, -1, 60000)});
    }
    const Prefetch prefetch(options);
    StepProgram one = plain, other = plain;
    run_pipeline(one, {&prefetch});
    for (Value& value : other.values) value.bytes = {pick(random, 0, 1 << 16)};
    StepProgram loose = other;
    run_pipeline(loose, {&prefetch});
    ASSERT_EQ(collective_order(one), collective_order(loose)) << seed;
    PipelineOptions tight;
    tight.environment.memory_budget = memory_timeline(other).peak + Bytes{pick(random, 0, 1 << 16)};
    try {
      run_pipeline(other, {&prefetch}, tight);
    } catch (const UserError&) {
      continue;  // the agreed order does not fit
    }
    ASSERT_EQ(collective_order(one), collective_order(other)) << seed;
    ASSERT_LE(memory_timeline(other).peak, *tight.environment.memory_budget) << seed;
  }
}

}  // namespace
}  // namespace deepcompile::passes_prefetch_test
