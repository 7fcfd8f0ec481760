// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <span>

#include "analysis/liveness.h"
#include "ir/text.h"
#include "test_support.h"

namespace deepcompile::analysis_liveness_test {
namespace {

std::string names(const StepProgram& program, std::span<const ValueId> ids) {
  std::string out;
  for (ValueId id : ids) out += (out.empty() ? "" : " ") + program.value(id).name;
  return out;
}

// "<section>: <instruction>: frees <values>" for each that frees; then what is saved.
std::string show(const StepProgram& program) {
  const Liveness liveness = analyze_liveness(program);
  std::string out;
  for (size_t s = 0; s < program.sections.size(); ++s) {
    const Section& section = program.sections[s];
    for (size_t i = 0; i < section.instrs.size(); ++i) {
      const auto& frees = liveness.sections[s].frees[i];
      if (frees.empty()) continue;
      out += section_name(section) + ": " + print(program, section.instrs[i]) + ": frees " +
             names(program, frees) + "\n";
    }
    if (liveness.sections[s].saved.empty()) continue;
    out += section_name(section) + ": saves " + names(program, liveness.sections[s].saved) + "\n";
  }
  return out;
}

TEST(Liveness, FollowsValuesFromForwardToBackward) {
  EXPECT_EQ(show(two_layers_zero3()), R"(forward 0: saves x h s
backward 0: run b.b: frees h s t.loss
backward 0: reduce b (g.b): frees g.b
backward 0: run b.a: frees x d
backward 0: reduce a (g.a): frees g.a
backward 0: reduce norms (g.n1, g.n0): frees g.n0 g.n1
)");
}

TEST(Liveness, OutputsStayAndUnusedValuesDieAtOnce) {
  // `dead` is never read; `unused` is an input that nothing reads; y is an
  // output of the forward and of the backward; `z` is read twice by one run.
  EXPECT_EQ(show(parse_program(R"(step s world=1
value x 4B
value unused 4B
value y 4B
value z 4B
value dead 4B
value t 4B
region f code=0 (x) -> (y, z, dead)
region f2 code=0 (z, z) -> ()
region b code=0 (t) -> ()
forward 0 (x, unused) -> (y)
  run f
  run f2
end
backward 0 (t) -> (y)
  run b
end
)")),
            R"(forward 0: run f: frees x unused dead
forward 0: run f2: frees z
forward 0: saves y
backward 0: run b: frees t
)");
}

TEST(Liveness, ARegionRunAgainMakesItsValuesAnew) {
  // h is not saved: the backward runs f again. Only x is.
  EXPECT_EQ(show(parse_program(R"(step s world=1
value x 4B
value h 4B
value y 4B
value t 4B
region f code=0 (x) -> (h)
region l code=0 (h) -> (y)
region b code=0 (t, h) -> ()
forward 0 (x) -> (y)
  run f
  run l
end
backward 0 (t) -> ()
  run f
  run b
end
)")),
            R"(forward 0: run l: frees h
forward 0: saves x
backward 0: run f: frees x
backward 0: run b: frees h t
)");
}

}  // namespace
}  // namespace deepcompile::analysis_liveness_test
