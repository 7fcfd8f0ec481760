// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

#include "ir/text.h"
#include "passes/pipeline.h"
#include "test_support.h"

namespace deepcompile::passes_pipeline_test {
namespace {

TEST(Pipeline, LogsEachPass) {
  PassRegistry registry = PassRegistry::with_builtins();
  registry.add(
      make_pass("look", {.needs = {Fact::kGathersPlaced}}, [](StepProgram&, PassContext&) {}));
  registry.add(make_pass(
      "unshard", {.needs = {Fact::kGathersPlaced}}, [](StepProgram& program, PassContext& context) {
        auto& forward = program.sections[0].instrs;
        std::erase_if(forward, [](const Instr& i) { return i.op == Op::kRelease; });
        context.because("memory is plentiful");
        context.because(RegionId{1}, "needs both");
      }));
  StepProgram program = parse_program(kTwoLayers);
  int64_t now = 0;
  PipelineOptions options;
  options.clock = [&] { return Nanos{now += 1500}; };
  const auto log = run_pipeline(program, registry, {"zero3_compile", "look", "unshard"}, options);
  EXPECT_EQ(print(log),
            "1 zero3_compile: 4 -> 27 instructions, 3 reasons, 1.50 us\n"
            "2 look: no change, 1.50 us\n"
            "3 unshard: 27 -> 25 instructions, 2 reasons, 1.50 us\n");
  EXPECT_EQ(program.reasons.back().pass, "unshard");
  EXPECT_EQ(program.reasons.back().object, "f.b");
  // Without a clock, the log has no times and repeats exactly.
  StepProgram again = parse_program(kTwoLayers);
  EXPECT_EQ(print(run_pipeline(again, registry, {"zero3_compile"})),
            "1 zero3_compile: 4 -> 27 instructions, 3 reasons\n");
}

TEST(Pipeline, ChecksContractsBeforeAnythingRuns) {
  PassRegistry registry = PassRegistry::with_builtins();
  bool ran = false;
  registry.add(make_pass("first", {}, [&](StepProgram&, PassContext&) { ran = true; }));
  registry.add(
      make_pass("early", {.needs = {Fact::kGathersPlaced}}, [](StepProgram&, PassContext&) {}));
  StepProgram program = parse_program(kTwoLayers);
  EXPECT_EQ(error_of([&] {
              run_pipeline(program, registry, {"first", "early", "zero3_compile"});
            }),
            "[passes] early: needs gathers_placed, which neither the program nor an earlier pass "
            "provides. Put a pass that does before it.");
  EXPECT_EQ(error_of([&] {
              run_pipeline(program, registry, {"first", "zero3_compile", "zero0_compile"});
            }),
            "[passes] zero0_compile: conflicts with gathers_placed, which zero3_compile provides. "
            "Remove one of the two passes.");
  EXPECT_EQ(error_of([&] {
              run_pipeline(program, registry, {"first", "zero4"});
            }),
            "[passes] zero4: there is no such pass. Known passes: zero0_compile, zero1_compile, "
            "zero3_compile, rematerialize, offload_activation, offload_adam_states, "
            "offload_adam_states_sync, prefetch, selective_gather, place_optimizer, order_link, "
            "coalesce, auto, first, early.");
  EXPECT_FALSE(ran);
  EXPECT_EQ(print(program), kTwoLayers);
}

TEST(Pipeline, NamesThePassThatBreaksTheProgramAndUndoesIt) {
  PassRegistry registry = PassRegistry::with_builtins();
  registry.add(make_pass("careless", {.needs = {Fact::kGathersPlaced}},
                         [](StepProgram& program, PassContext&) {
                           program.sections[0].instrs.erase(program.sections[0].instrs.begin() + 1);
                         }));
  StepProgram program = parse_program(kTwoLayers);
  EXPECT_EQ(error_of([&] {
              run_pipeline(program, registry, {"zero3_compile", "careless"});
            }),
            "[passes] careless: left a program that is not valid: two: forward 0, instruction 2 "
            "(run f.a): uses a before its gather has been waited for. Put `wait a` before it.");
  EXPECT_EQ(print(program), kTwoLayers);
}

// ra and rb draw random numbers, and may write to the model's input s; reads reads it before.
TEST(Pipeline, RunsThatAreNotRepeatableKeepTheirPlaces) {
  const std::string text = R"(step once
value s 64B
value a 4B
value b 4B
value c 4B
region reads time=1ns (s) -> (c)
region ra time=1ns once (s) -> (a)
region rb time=1ns once () -> (b)
forward 0 (s) -> (a, b, c)
  run reads
  run ra
  run rb
end
)";
  const auto swapped = [&](size_t i, size_t j) {
    const auto pass = make_pass("swaps", {}, [=](StepProgram& program, PassContext&) {
      std::swap(program.sections[0].instrs[i], program.sections[0].instrs[j]);
    });
    StepProgram program = parse_program(text);
    return error_of([&] { run_pipeline(program, {pass.get()}); });
  };
  const std::string why =
      ", which draws random numbers or writes to its inputs: the result would not be the same. "
      "Leave them in their order.";
  EXPECT_EQ(swapped(1, 2), "[passes] swaps: `run ra` is on the other side of `run rb`" + why);
  EXPECT_EQ(swapped(0, 1), "[passes] swaps: `run reads` is on the other side of `run ra`" + why);
  // rb reads nothing that anybody writes to.
  StepProgram program =
      parse_program(replaced(text, "region reads time=1ns (s)", "region reads time=1ns ()"));
  const auto last = make_pass("last", {}, [](StepProgram& edited, PassContext&) {
    auto& instrs = edited.sections[0].instrs;
    std::rotate(instrs.begin(), instrs.begin() + 1, instrs.end());
  });
  run_pipeline(program, {last.get()});
  EXPECT_EQ(print(program, program.sections[0].instrs[2]), "run reads");
}

TEST(Pipeline, LetsOtherExceptionsThrough) {
  struct Foreign {};
  StepProgram program = parse_program(kTwoLayers);
  const auto pass = make_pass("throws", {}, [](StepProgram& p, PassContext&) {
    p.sections.clear();
    throw Foreign{};
  });
  EXPECT_THROW(run_pipeline(program, {pass.get()}), Foreign);
  EXPECT_EQ(print(program), kTwoLayers);
}

TEST(Pipeline, RefusesAnInvalidProgram) {
  StepProgram program = parse_program(replaced(kTwoLayers, "  run b.a\n", ""));
  EXPECT_EQ(error_of([&] { run_pipeline(program, std::vector<const Pass*>{}); }),
            "[ir] two: region b.a is never run. Run it or remove it; if the text was cut short, "
            "save it again.");
}

TEST(Registry, KeepsNamesApart) {
  PassRegistry registry = PassRegistry::with_builtins();
  const auto add = [&](const char* name) {
    return error_of([&] { registry.add(make_pass(name, {}, [](StepProgram&, PassContext&) {})); });
  };
  EXPECT_EQ(add("mine"), "no error");
  EXPECT_EQ(add("mine"), "[passes] mine: a pass of this name exists. Choose another name.");
  EXPECT_EQ(add("my pass"),
            "[passes] 'my pass' is not a pass name. Use letters, digits and _ . : / -, and begin "
            "with a letter, a digit or _.");
  EXPECT_EQ(registry.names(),
            (std::vector<std::string>{
                "zero0_compile", "zero1_compile", "zero3_compile", "rematerialize",
                "offload_activation", "offload_adam_states", "offload_adam_states_sync", "prefetch",
                "selective_gather", "place_optimizer", "order_link", "coalesce", "auto", "mine"}));
  EXPECT_EQ(registry.get("mine").summary(), "user-defined");
  // Another engine's registry does not know it.
  EXPECT_EQ(PassRegistry::with_builtins().find("mine"), nullptr);
}

TEST(Facts, AreReadOffTheProgram) {
  EXPECT_EQ(facts_of(parse_program(kTwoLayers)), (std::set<Fact>{Fact::kRegionsTimed}));
  EXPECT_EQ(facts_of(two_layers_zero3()),
            (std::set<Fact>{Fact::kGathersPlaced, Fact::kReductionsPlaced, Fact::kUpdatesPlaced,
                            Fact::kRegionsTimed}));
  for (int i = 0; i < kFactCount; ++i) {
    EXPECT_EQ(parse_fact(to_string(static_cast<Fact>(i))), static_cast<Fact>(i));
  }
  EXPECT_EQ(parse_fact("nonsense"), std::nullopt);
}

}  // namespace
}  // namespace deepcompile::passes_pipeline_test
