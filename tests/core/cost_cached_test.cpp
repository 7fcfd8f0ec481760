// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "cost/cached_costs.h"
#include "ir/text.h"
#include "layered_program.h"
#include "random_program.h"
#include "sim/simulator.h"
#include "unit_cost.h"

namespace deepcompile::cost_cached_test {
namespace {

// Counts how often it is asked.
class Counting final : public Estimator {
 public:
  Nanos duration(const StepProgram& program, const Instr& instr) const override {
    ++asked;
    return costs.duration(program, instr);
  }
  Nanos local_sum(const StepProgram& program, ParamId id) const override {
    ++asked;
    return costs.local_sum(program, id);
  }
  Nanos staging(const StepProgram& program, ParamId id) const override {
    ++asked;
    return costs.staging(program, id);
  }
  Nanos section_overhead(const StepProgram& program, SectionKind kind) const override {
    ++asked;
    return costs.section_overhead(program, kind);
  }
  double compute_slowdown(const StepProgram& program) const override {
    return costs.compute_slowdown(program);
  }

  UnitCost costs;
  mutable int asked = 0;
};

TEST(CachedCosts, AskOnceAndSayTheSame) {
  for (uint32_t seed = 0; seed < 50; ++seed) {
    const StepProgram program = random_program(seed);
    Counting counting;
    const CachedCosts cached(program, counting);
    const SimSummary alone = simulate_summary(program, counting.costs);
    for (int i = 0; i < 2; ++i) {
      const SimSummary summary = simulate_summary(program, cached);
      ASSERT_EQ(summary.time, alone.time) << seed;
      ASSERT_EQ(summary.peak, alone.peak) << seed;
      const int asked = std::exchange(counting.asked, 0);
      ASSERT_TRUE(i == 0 ? asked > 0 : asked == 0) << seed;
    }
  }
}

TEST(CachedCosts, CopiesOfValuesAreAskedForEachTime) {
  const StepProgram program = parse_program(layered_program());
  const Counting counting;
  const CachedCosts cached(program, counting);
  const auto time = [&](const char* name) {
    return cached.duration(program,
                           {Op::kOffload, std::nullopt, std::nullopt, {*program.find_value(name)}});
  };
  EXPECT_EQ(time("h.1"), Nanos{1024});
  EXPECT_EQ(time("q.0"), Nanos{4096});
  EXPECT_EQ(counting.asked, 2);
}

}  // namespace
}  // namespace deepcompile::cost_cached_test
