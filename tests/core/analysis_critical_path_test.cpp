// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "critical_path.h"
#include "ir/text.h"
#include "test_support.h"

namespace deepcompile::analysis_critical_path_test {
namespace {

std::string show(const StepProgram& program, const CriticalPath& path) {
  std::string out;
  for (const InstrAt& at : path.instrs) {
    out +=
        (out.empty() ? "" : "; ") + print(program, program.sections[at.section].instrs[at.instr]);
  }
  return out;
}

InstrTime times(const StepProgram& program, Nanos gather) {
  return [&program, gather](const Section&, const Instr& instr) {
    switch (instr.op) {
      case Op::kGather:
        return gather;
      case Op::kRun:
        return *program.region(*instr.region).time;
      case Op::kReduce:
        return Nanos{5};
      case Op::kUpdate:
        return Nanos{2};
      default:
        return Nanos{1};
    }
  };
}

// Both gathers start at 0 and end at 50; f.a 60, f.b 70; b.b 90, b.a 110 (its
// gathers were long done); reduce a 115; accumulate b 111, a 116, norms 117;
// updates 119, 121, 123; gather norms 173.
TEST(CriticalPath, IsWorkedOutByHand) {
  const StepProgram program = two_layers_zero3();
  const CriticalPath path = critical_path(program, times(program, Nanos{50}));
  EXPECT_EQ(path.length, Nanos{173});
  EXPECT_EQ(show(program, path),
            "gather a; run f.a; run f.b; run b.b; run b.a; reduce a (g.a); accumulate a; "
            "accumulate norms; update a; update b; update norms; gather norms");
}

// With nothing to transfer, the path is the compute.
TEST(CriticalPath, OfComputeAloneIsItsSum) {
  const StepProgram program = parse_program(kTwoLayers);
  const CriticalPath path = critical_path(program, times(program, Nanos{50}));
  EXPECT_EQ(path.length, Nanos{10 + 10 + 20 + 20});
  EXPECT_EQ(show(program, path), "run f.a; run f.b; run b.b; run b.a");
}

TEST(CriticalPath, AGatherOfWhatIsWholeCostsNothing) {
  StepProgram program = two_layers_zero3();
  const CriticalPath before = critical_path(program, times(program, Nanos{50}));
  auto& forward = program.sections[0].instrs;
  forward.insert(forward.begin() + 2, forward[0]);
  EXPECT_EQ(critical_path(program, times(program, Nanos{50})).length, before.length);
}

TEST(CriticalPath, OfNothingIsEmpty) {
  const StepProgram program = parse_program("step s\nforward 0 () -> ()\nend\n");
  const CriticalPath path = critical_path(program, times(program, Nanos{1}));
  EXPECT_EQ(path.length, Nanos{0});
  EXPECT_TRUE(path.instrs.empty());
}

}  // namespace
}  // namespace deepcompile::analysis_critical_path_test
