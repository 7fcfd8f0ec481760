// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "analysis/next_use.h"
#include "test_support.h"

namespace deepcompile::analysis_next_use_test {
namespace {

TEST(NextUse, CountsInstructionsAndComputeTime) {
  // forward:  0 gather a, 1 wait, 2 run f.a, 3 release, 4 gather b, 5 wait, 6 run f.b, 7 release
  // backward: 0 gather b, 1 wait, 2 run b.b, 3 release, 4 reduce b, 5 gather a, 6 wait, 7 run b.a
  const StepProgram program = two_layers_zero3();
  const NextUse next(program);
  const ParamId a = *program.find_param("a");
  EXPECT_EQ(next.after(0, 0, a), (Use{0, 2, 2, Nanos{0}}));
  EXPECT_EQ(next.after(0, 2, a), (Use{1, 7, 13, Nanos{10 + 20}}));  // f.b and b.b between
  EXPECT_EQ(next.after(0, 6, a), (Use{1, 7, 9, Nanos{20}}));        // b.b between
  EXPECT_EQ(next.after(1, 7, a), std::nullopt);

  const ValueId h = *program.find_value("h");
  EXPECT_EQ(next.after(0, 2, h), (Use{0, 6, 4, Nanos{0}}));
  EXPECT_EQ(next.after(0, 6, h), (Use{1, 2, 4, Nanos{0}}));
  EXPECT_EQ(next.after(1, 2, *program.find_value("g.b")), (Use{1, 4, 2, Nanos{0}}));
  EXPECT_EQ(next.after(0, 0, *program.find_value("loss")), std::nullopt);
  // Members count as their parameter: f.b reads norms[1].
  EXPECT_EQ(next.after(0, 2, *program.find_param("norms")), (Use{0, 6, 4, Nanos{0}}));
}

}  // namespace
}  // namespace deepcompile::analysis_next_use_test
