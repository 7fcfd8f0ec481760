// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "ir/text.h"
#include "layered_program.h"
#include "passes/memory_use.h"
#include "passes/region_blocks.h"
#include "passes/step_clock.h"
#include "random_program.h"
#include "test_support.h"

namespace deepcompile::passes_memory_use_test {
namespace {

TEST(MemoryUse, AgreesWithAPlainRow) {
  for (uint32_t seed = 0; seed < 50; ++seed) {
    std::mt19937 random(seed);
    std::vector<Bytes> row(static_cast<size_t>(pick(random, 1, 40)));
    for (Bytes& each : row) each = Bytes{pick(random, 0, 100)};
    MemoryUse use(row);
    const auto size = static_cast<int64_t>(row.size());
    for (int step = 0; step < 50; ++step) {
      const auto first = static_cast<size_t>(pick(random, 0, size));
      const auto last = static_cast<size_t>(pick(random, 0, size));
      const Bytes more{pick(random, -50, 50)};
      use.add(first, last, more);
      for (size_t i = first; i < last; ++i) row[i] += more;
      const auto most = std::max_element(row.begin(), row.end());
      EXPECT_EQ(use.max(), *most);
      EXPECT_EQ(use.fullest(), static_cast<size_t>(most - row.begin()));
      std::optional<size_t> low, high;
      for (size_t i = first; i < last; ++i) {
        if (row[i] <= Bytes{60}) continue;
        if (!low) low = i;
        high = i;
      }
      EXPECT_EQ(use.first_above(first, last, Bytes{60}), low);
      EXPECT_EQ(use.last_above(first, last, Bytes{60}), high);
      if (first < last) {
        EXPECT_EQ(use.max(first, last), *std::max_element(row.begin() + first, row.begin() + last));
      }
    }
  }
}

TEST(StepClock, CountsComputeBeforeEachPoint) {
  const StepProgram program = parse_program(kTwoLayers);
  const StepClock clock(program, nullptr);
  // f.a 10, f.b 10, b.b 20, b.a 20.
  EXPECT_EQ(clock.points(), 4u);
  EXPECT_EQ(clock.before(3), Nanos{40});
  EXPECT_EQ(clock.start(1), 2u);
  EXPECT_EQ(clock.place(3), (std::pair<size_t, size_t>(1, 1)));
  EXPECT_EQ(clock.first_at(Nanos{15}, 0, 4), 2u);
  EXPECT_EQ(clock.first_at(Nanos{99}, 0, 3), 3u);
  EXPECT_EQ(clock.last_at(Nanos{15}, 0, 4), 1u);
  EXPECT_EQ(clock.last_at(Nanos{-5}, 2, 4), 2u);
}

TEST(RegionBlocks, LayersAreBlocks) {
  const StepProgram program = parse_program(layered_program({.layers = 3}));
  std::vector<RegionId> runs;
  for (const Instr& each : program.sections[0].instrs) runs.push_back(*each.region);
  EXPECT_EQ(divide_into_blocks(program, runs),
            (std::vector<size_t>{0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4}));
}

TEST(RegionBlocks, MarkedRegionsStandTogether) {
  StepProgram program = parse_program(layered_program({.layers = 3}));
  std::vector<RegionId> runs;
  for (const Instr& each : program.sections[0].instrs) {
    Region& region = program.regions[index(*each.region)];
    region.code = static_cast<uint32_t>(index(*each.region));  // no two alike
    region.checkpoint = region.name.starts_with("f.1");
    runs.push_back(*each.region);
  }
  EXPECT_EQ(divide_into_blocks(program, runs),
            (std::vector<size_t>{0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8}));
}

}  // namespace
}  // namespace deepcompile::passes_memory_use_test
