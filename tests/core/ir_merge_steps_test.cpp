// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "ir/merge_steps.h"
#include "ir/text.h"
#include "ir/verifier.h"
#include "test_support.h"

namespace deepcompile::ir_merge_steps_test {
namespace {

const char kUpdate[] = R"(step up world=2 accumulation=1 reduce=f32

param w f32 128
param v f32 64 whole (v1, v2)

update
end
)";

// A graph that uses w; `other` is one more parameter line.
std::string graph(const std::string& other) {
  return "step g world=2 accumulation=1 reduce=f32\n" + other + R"(
param w f32 128
value x 4B
value y 4B
value t 4B
value g.w 512B grad=w
region f code=0 (x, w) -> (y)
region b code=1 (t, w) -> (g.w)
forward 0 (x) -> (y)
  run f
end
backward 0 (t) -> ()
  run b
end
because note f "about a region"
because note w "about a parameter"
)";
}

TEST(MergeSteps, OneGraphKeepsItsNames) {
  const StepProgram merged = merge_steps("all", {parse_program(graph(""))}, parse_program(kUpdate));
  EXPECT_EQ(print(merged), R"(step all world=2 accumulation=1 reduce=f32

param w f32 128
param v f32 64 whole (v1, v2)

value x 4B
value y 4B
value t 4B
value g.w 512B grad=w

region f code=0 (x, w) -> (y)
region b code=1 (t, w) -> (g.w)

forward 0 (x) -> (y)
  run f
end
backward 0 (t) -> ()
  run b
end
update
end

because note f "about a region"
because note w "about a parameter"
)");
  verify(merged);
}

TEST(MergeSteps, SeveralGraphsUniteTheirParameters) {
  const StepProgram merged =
      merge_steps("all", {parse_program(graph("param u f32 64")), parse_program(graph(""))},
                  parse_program(kUpdate));
  EXPECT_EQ(print(merged), R"(step all world=2 accumulation=1 reduce=f32

param u f32 64
param w f32 128
param v f32 64 whole (v1, v2)

value g0.x 4B
value g0.y 4B
value g0.t 4B
value g0.g.w 512B grad=w
value g1.x 4B
value g1.y 4B
value g1.t 4B
value g1.g.w 512B grad=w

region g0.f code=0 (g0.x, w) -> (g0.y)
region g0.b code=1 (g0.t, w) -> (g0.g.w)
region g1.f code=0 (g1.x, w) -> (g1.y)
region g1.b code=1 (g1.t, w) -> (g1.g.w)

forward 0 (g0.x) -> (g0.y)
  run g0.f
end
forward 1 (g1.x) -> (g1.y)
  run g1.f
end
backward 1 (g1.t) -> ()
  run g1.b
end
backward 0 (g0.t) -> ()
  run g0.b
end
update
end

because note g0.f "about a region"
because note w "about a parameter"
because note g1.f "about a region"
because note w "about a parameter"
)");
  verify(merged);
}

TEST(MergeSteps, NamesTheDisagreement) {
  const auto merge = [](const std::string& a, const std::string& b) {
    return error_of([&] { merge_steps("all", {parse_program(a)}, parse_program(b)); });
  };
  const std::string g = graph("");
  EXPECT_EQ(merge(g, replaced(kUpdate, "world=2", "world=4")),
            "[ir] merge into all: program up has another world size than the first. Build all of "
            "them for the same run.");
  EXPECT_EQ(merge(g, replaced(kUpdate, "reduce=f32", "reduce=bf16")),
            "[ir] merge into all: program up has another reduce type than the first. Build all of "
            "them for the same run.");
  EXPECT_EQ(merge(g, replaced(kUpdate, "param w f32 128", "param w f32 129")),
            "[ir] merge into all: parameter w has another number of elements in program up than "
            "before. Build all programs from one model.");
  EXPECT_EQ(merge(g, replaced(kUpdate, "param w f32 128", "param w f32 128 whole")),
            "[ir] merge into all: parameter w has another placement in program up than before. "
            "Build all programs from one model.");
  EXPECT_EQ(merge(g, g),
            "[ir] merge into all: program g is not an update program. Give it one section, of kind "
            "update.");
  EXPECT_EQ(merge(kUpdate, kUpdate),
            "[ir] merge into all: graph program up has an update section. Pass it as the update "
            "program.");
  const std::string two = replaced(g, "because note f", "forward 1 () -> ()\nend\nbecause note f");
  EXPECT_EQ(merge(two, kUpdate),
            "[ir] merge into all: graph program g has two forward sections. Pass one graph a "
            "program.");
}

}  // namespace
}  // namespace deepcompile::ir_merge_steps_test
