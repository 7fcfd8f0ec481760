// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "ir/text.h"
#include "ir/verifier.h"
#include "test_support.h"

namespace deepcompile::ir_verifier_test {
namespace {

std::string verify_text(const std::string& text) {
  return error_of([&] { verify(parse_program(text)); });
}

// kTwoLayers as zero3_compile leaves it, and clipping.
std::string complete() {
  std::string text = replaced(kTwoLayers, "accumulation=1 reduce", "accumulation=1 clip reduce");
  text = replaced(text, "  run f.a\n  run f.b\n",
                  "  gather a\n  wait a\n  run f.a\n  release a\n"
                  "  gather b\n  wait b\n  run f.b\n  release b\n");
  text = replaced(text, "  run b.b\n  run b.a\n",
                  "  gather b\n  wait b\n  run b.b\n  release b\n  reduce b (g.b)\n"
                  "  gather a\n  wait a\n  run b.a\n  release a\n  reduce a (g.a)\n"
                  "  accumulate b\n  reduce norms (g.n0, g.n1)\n"
                  "  accumulate a\n  accumulate norms\n");
  return replaced(text, "update\nend",
                  "update\n  norm\n  update a\n  update b\n  update norms\n"
                  "  gather norms\n  wait norms\nend");
}

TEST(Verifier, AcceptsComputeOnlyAndCompletePrograms) {
  EXPECT_EQ(verify_text(kTwoLayers), "no error");
  EXPECT_EQ(verify_text(complete()), "no error");
  EXPECT_EQ(error_of([] { verify_plan(parse_program(kTwoLayers)); }),
            "[ir] two: forward 0, instruction 1 (run f.a): uses a, which nothing in this section "
            "gathers. Put `gather a` and `wait a` before it.");
}

TEST(Verifier, AcceptsWhatOptimisedPlansDo) {
  // Kept gathered from forward to backward; gathered early; waited for twice.
  std::string text = replaced(complete(), "  run f.b\n  release b\n", "  run f.b\n  wait b\n");
  text = replaced(text, "  gather a\n  wait a\n  run f.a\n  release a\n  gather b\n",
                  "  gather a\n  gather b\n  gather a\n  wait a\n  run f.a\n  release a\n");
  EXPECT_EQ(verify_text(text), "no error");
  // A region run again in the backward, instead of its output saved.
  text = replaced(complete(), "  run b.b\n", "  gather a\n  wait a\n  run f.a\n  run b.b\n");
  EXPECT_EQ(verify_text(text), "no error");
}

struct Edit {
  const char* from;
  const char* to;
  const char* message;  // after "[ir] two: "
};

void expect_errors(const std::string& text, const std::vector<Edit>& edits) {
  for (const Edit& edit : edits) {
    EXPECT_EQ(verify_text(replaced(text, edit.from, edit.to)),
              std::string("[ir] two: ") + edit.message);
  }
}

TEST(Verifier, ChecksStructure) {
  expect_errors(
      kTwoLayers,
      {{"  run f.a\n  run f.b", "  run f.b\n  run f.a",
        "forward 0, instruction 1 (run f.b): uses h before it is made. Run the region that makes "
        "it first, or list it as an input of the section."},
       {"  run f.b\n", "",
        "forward 0: output loss is not made by its end. Run the region that makes it."},
       {"  run b.a\n", "",
        "region b.a is never run. Run it or remove it; if the text was cut short, save it again."},
       {"  run f.a\n", "  run f.a\n  run f.a\n",
        "forward 0, instruction 2 (run f.a): runs a second time in this section. Remove one of "
        "them."},
       {"(x, a, norms) -> (h)", "(x, a, norms) -> (h, x)",
        "forward 0, instruction 1 (run f.a): makes x, which is made already, as an input of "
        "forward 0. One value has one maker: rename one."},
       {"-> (s, loss)", "-> (s, loss, h)",
        "forward 0, instruction 2 (run f.b): makes h, which is made already, by region f.a. One "
        "value has one maker: rename one."},
       {"backward 0 (t.loss)", "backward 0 (t.loss, h)",
        "backward 0: input h is made already, by region f.a. One value has one maker: rename one."},
       {"-> (s, loss)", "-> (s, loss, g.b)",
        "forward 0, instruction 2 (run f.b): makes the gradient g.b. Gradients are made in "
        "backward sections: run it there."},
       {"param b f32 128", "param b f32 128 frozen",
        "value g.b is the gradient of b, which is frozen. Leave out `grad=`, or the `frozen`."},
       {"backward 0", "backward 1",
        "backward 1: no forward 1 stands before it. Put the graph's forward first."},
       {"backward 0 (t.loss)", "inference 0 (t.loss)",
        "inference 0: the graph also has a forward. Give the inference graph its own number."},
       {"backward 0 (t.loss)", "forward 0 (t.loss)",
        "forward 0: is there twice. Give each graph its own number."},
       {"update\nend\n", "update\nend\nupdate\nend\n",
        "update: is not the last section. Put it at the end, once."},
       {"  run f.a\n", "  run f.a\n  reduce a ()\n",
        "forward 0, instruction 2 (reduce a ()): does not belong in a forward section. Move it to "
        "a backward."},
       {"update\nend", "update\n  run b.a\nend",
        "update, instruction 1 (run b.a): does not belong in an update section. Move it to a "
        "forward, backward or inference."},
       {"  run b.b\n", "  defer a\n  run b.b\n",
        "backward 0, instruction 1 (defer a): does not belong in a backward section. Move it to "
        "the update."},
       {"update\nend\n", "inference 1 (t.loss) -> ()\nend\n",
        "inference 1: input t.loss is made already, as an input of backward 0. One value has one "
        "maker: rename one."},
       {"update\nend\n", "inference 1 () -> (loss)\nend\n",
        "inference 1: output loss is not made by its end. Run the region that makes it."},
       {"update\nend\n", "inference 1 () -> ()\n  run f.b\nend\n",
        "inference 1, instruction 1 (run f.b): belongs to graph 0, which ran it before. Give each "
        "graph its own regions."}});
  EXPECT_EQ(verify_text("step s world=2"),
            "[ir] s: has no sections. Add a forward, backward, inference or update; if the text "
            "was cut short, save it again.");
}

TEST(Verifier, ChecksTablesThatWereEditedByHand) {
  const auto broken = [](auto edit) {
    StepProgram program = parse_program(kTwoLayers);
    edit(program);
    return error_of([&] { verify(program); });
  };
  EXPECT_EQ(broken([](StepProgram& p) { p.params[0].name = "z"; }),
            "[ir] two: parameter 'z' is not in the table of names. Add it through add_param, and "
            "do not rename it.");
  EXPECT_EQ(broken([](StepProgram& p) {
              p.values.push_back({"v", Bytes{4}, {}});
            }),
            "[ir] two: value 'v' is not in the table of names. Add it through add_value, and do "
            "not rename it.");
  EXPECT_EQ(broken([](StepProgram& p) { p.world = 0; }),
            "[ir] two: world is 0 and accumulation 1. Both are at least 1.");
  EXPECT_EQ(broken([](StepProgram& p) { p.regions[0].outputs = {ValueId{99}}; }),
            "[ir] two: region f.a names value 99, which is not there. Correct the reference.");
  EXPECT_EQ(broken([](StepProgram& p) {
              p.regions[0].inputs[1] = ParamRef{ParamId{0}, 4};
            }),
            "[ir] two: region f.a names member 4 of parameter 0, which is not there. Correct the "
            "reference.");
  EXPECT_EQ(broken([](StepProgram& p) { p.sections[0].outputs.push_back(ValueId{99}); }),
            "[ir] two: forward 0 names value 99, which is not there. Correct the reference.");
  EXPECT_EQ(broken([](StepProgram& p) { p.sections[0].instrs[0].region.reset(); }),
            "[ir] two: forward 0: instruction 1 (run) has a missing, surplus or unknown operand. "
            "Give it what its kind takes.");
  EXPECT_EQ(broken([](StepProgram& p) {
              p.sections[0].instrs.push_back({Op::kGather, ParamId{77}, std::nullopt, {}});
            }),
            "[ir] two: forward 0: instruction 3 (gather) has a missing, surplus or unknown "
            "operand. Give it what its kind takes.");
}

TEST(Verifier, ChecksGathersAndReleases) {
  expect_errors(
      complete(),
      {{"  gather a\n  wait a\n  run f.a", "  gather a\n  run f.a",
        "forward 0, instruction 2 (run f.a): uses a before its gather has been waited for. Put "
        "`wait a` before it."},
       {"  gather a\n  wait a\n  run f.a", "  wait a\n  run f.a",
        "forward 0, instruction 1 (wait a): nothing gathers a before it. Put `gather a` before "
        "it."},
       {"  gather a\n  wait a\n  run f.a\n", "  run f.a\n",
        "forward 0, instruction 1 (run f.a): uses a, which nothing in this section gathers. Put "
        "`gather a` and `wait a` before it."},
       {"  run f.b\n  release b\n", "  release b\n  run f.b\n",
        "forward 0, instruction 8 (run f.b): uses b after its release. Move the release after it, "
        "or gather b again."},
       {"  run f.b\n", "  run f.b\n  gather a\n  release a\n",
        "forward 0, instruction 9 (release a): the gather of a may still be writing. Put `wait a` "
        "before it."},
       {"  run f.b\n", "  run f.b\n  release a\n",
        "forward 0, instruction 8 (release a): a is not whole here. Remove it, or gather a first."},
       {"  run f.b\n", "  run f.b\n  release norms\n",
        "forward 0, instruction 8 (release norms): norms is kept whole and has nothing to release. "
        "Remove it."}});
}

TEST(Verifier, ChecksReductions) {
  expect_errors(
      complete(),
      {{"  reduce a (g.a)\n  accumulate b\n", "  accumulate b\n",
        "backward 0, instruction 12 (accumulate a): no reduction of a is under way. Put it after "
        "`reduce a`, once."},
       {"  reduce a (g.a)\n", "  reduce a (g.a)\n  reduce a (g.a)\n",
        "backward 0, instruction 11 (reduce a (g.a)): a is reduced already in this section. Reduce "
        "all its gradients at once."},
       {"reduce norms (g.n0, g.n1)", "reduce norms (g.n0)",
        "backward 0: the gradient g.n1 is never reduced. Name it in `reduce norms`."},
       {"reduce norms (g.n0, g.n1)", "reduce norms (g.n0, g.n1, g.n0)",
        "backward 0, instruction 12 (reduce norms (g.n0, g.n1, g.n0)): names g.n0 twice. Remove "
        "one of them."},
       {"reduce norms (g.n0, g.n1)", "reduce norms (g.n0, g.n1, g.a)",
        "backward 0, instruction 12 (reduce norms (g.n0, g.n1, g.a)): g.a is not a gradient of "
        "norms. Remove it."},
       {"reduce a (g.a)", "reduce a ()",
        "backward 0, instruction 10 (reduce a ()): names no gradient. List the gradients of a."},
       {"  run b.a\n  release a\n  reduce a (g.a)\n", "  reduce a (g.a)\n  run b.a\n  release a\n",
        "backward 0, instruction 8 (reduce a (g.a)): uses g.a before it is made. Run the region "
        "that makes it first, or list it as an input of the section."},
       {"  accumulate a\n", "",
        "backward 0: the reduction of a is never accumulated. Put `accumulate a` before the end."},
       {"  accumulate a\n", "  accumulate a\n  accumulate a\n",
        "backward 0, instruction 14 (accumulate a): no reduction of a is under way. Put it after "
        "`reduce a`, once."}});
  std::string frozen = replaced(complete(), "param a f32 128", "param a f32 128 frozen");
  frozen = replaced(frozen, "value g.a 512B grad=a", "value g.a 512B");
  EXPECT_EQ(verify_text(frozen),
            "[ir] two: backward 0, instruction 10 (reduce a (g.a)): a is frozen. Remove the "
            "reduce.");
}

// Two gradients of one parameter, by regions of two graphs and in one.
TEST(Verifier, NothingIsReducedAfterItsUpdateAndEachInItsOrder) {
  const std::string text = R"(step two world=2
param p f32 128
value x 4B
value y 4B
value tx 4B
value ty 4B
value g0 512B grad=p
value g1 512B grad=p
value g2 512B grad=p
region f0 (x, p) -> ()
region f1 (y, p) -> ()
region b0 (tx) -> (g0)
region b1 (ty, p) -> (g1)
region b2 (ty) -> (g2)
forward 0 (x) -> ()
  gather p
  wait p
  run f0
  release p
end
forward 1 (y) -> ()
  gather p
  wait p
  run f1
  release p
end
backward 1 (ty) -> ()
  gather p
  wait p
  run b1
  release p
  run b2
  reduce p (g1, g2)
  accumulate p
end
backward 0 (tx) -> ()
  run b0
  reduce p (g0)
  accumulate p
end
update
  update p
end
)";
  EXPECT_EQ(verify_text(text), "no error");
  expect_errors(
      text, {{"  accumulate p\nend\nbackward 0", "  accumulate p\n  update p\nend\nbackward 0",
              "backward 0, instruction 2 (reduce p (g0)): p has had its update in this step's "
              "backward. Update it later."},
             {"reduce p (g1, g2)", "reduce p (g2, g1)",
              "backward 1, instruction 6 (reduce p (g2, g1)): names g1 behind a gradient of the "
              "same member that is made later: they are added in this order. Name them as they are "
              "made."}});
}

TEST(Verifier, ChecksTheUpdate) {
  expect_errors(
      complete(),
      {{"  norm\n", "",
        "update, instruction 1 (update a): the step clips and has no norm before this. Put `norm` "
        "before all updates."},
       {"  norm\n", "  norm\n  norm\n",
        "update, instruction 2 (norm): the norm is there twice. Remove one of them."},
       {" clip ", " ",
        "update, instruction 1 (norm): the step does not clip. Remove it, or add `clip` to the "
        "step."},
       {"  update b\n", "",
        "update: b is never updated. Put `update b` into it, or mark b frozen."},
       {"  update b\n", "  update b\n  update b\n",
        "update, instruction 4 (update b): b is updated already. Remove one of the updates."},
       {"  update b\n", "  gather b\n  update b\n",
        "update, instruction 4 (update b): the gather of b may still be reading the shard. Put "
        "`wait b` before it."},
       {"  gather norms\n  wait norms\n", "",
        "update: norms is kept whole and is not gathered again after its update. Put `gather "
        "norms` and `wait norms` after it."},
       {"  gather norms\n  wait norms\n", "  gather norms\n",
        "update: norms is kept whole and is not gathered again after its update. Put `gather "
        "norms` and `wait norms` after it."}});
  std::string late = replaced(complete(), "  norm\n  update a\n", "  update a\n  norm\n");
  EXPECT_EQ(verify_text(late),
            "[ir] two: update, instruction 1 (update a): the step clips and has no norm before "
            "this. Put `norm` before all updates.");
}

// s may be written to by w, in the forward or in the backward.
TEST(Verifier, NothingRunsAgainBehindWhatMayWriteToItsInputs) {
  const std::string text = R"(step two world=1
value s 64B
value h 4B
value d 4B
value o 4B
region f (s) -> (h)
region w once (s) -> (o)
region b (d, h) -> ()
forward 0 (s) -> ()
  run f
end
backward 0 (d) -> ()
  run f
  run w
  run b
end
)";
  EXPECT_EQ(verify_text(text), "no error");
  const std::string why =
      " (run f): ran before `run w`, which may write to s: again would not be the same. Keep its "
      "outputs.";
  EXPECT_EQ(verify_text(replaced(text, "  run f\n  run w\n", "  run w\n  run f\n")),
            "[ir] two: backward 0, instruction 2" + why);
  EXPECT_EQ(verify_text(
                replaced(replaced(text, "  run w\n", ""), "  run f\nend", "  run f\n  run w\nend")),
            "[ir] two: backward 0, instruction 1" + why);
  // First run behind it: again it reads the same.
  EXPECT_EQ(verify_text(
                replaced(replaced(text, "  run w\n", ""), "  run f\nend", "  run w\n  run f\nend")),
            "no error");
}

TEST(Verifier, ComparesTheOrderOfCollectives) {
  const StepProgram program = parse_program(complete());
  const std::vector<std::string> expected = {
      "forward 0: gather a",      "forward 0: gather b",  "backward 0: gather b",
      "backward 0: reduce b",     "backward 0: gather a", "backward 0: reduce a",
      "backward 0: reduce norms", "update: norm",         "update: gather norms"};
  EXPECT_EQ(collective_order(program), expected);

  // Other shapes and names of values: the same order.
  const StepProgram other = parse_program(
      replaced(replaced(complete(), "value h 1KiB", "value h 9KiB"), "t.loss", "tangent"));
  EXPECT_EQ(order_difference(collective_order(program), collective_order(other)), std::nullopt);

  const StepProgram moved = parse_program(replaced(complete(), "  gather a\n  wait a\n  run f.a",
                                                   "  gather b\n  gather a\n  wait a\n  run f.a"));
  EXPECT_EQ(order_difference(collective_order(program), collective_order(moved)),
            "collective 1 is 'forward 0: gather a' in one and 'forward 0: gather b' in the other");
  EXPECT_EQ(order_difference({"a"}, {"a", "b"}),
            "collective 2 is nothing more in one and 'b' in the other");
}

}  // namespace
}  // namespace deepcompile::ir_verifier_test
