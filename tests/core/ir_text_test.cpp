// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "ir/text.h"
#include "ir/verifier.h"
#include "test_support.h"

namespace deepcompile::ir_text_test {
namespace {

const char kEverything[] = R"(step llama world=2 accumulation=4 clip reduce=bf16

param embed f32 16384
param L0.q bf16 4096 frozen
param 0.weight f64 4096 replicated
param small f32 512 whole (model.norm.weight, 0.bias, "odd \"name\"")

value ids 512B
value h0 1536B
value loss 4B
value t.loss 4B
value g.embed 64KiB grad=embed
value g.n 64B grad=small[2]

region fwd.0 code=0 workspace=410MiB moved=10MiB flops=1000000 time=3ms (ids, embed, small[1]) -> (h0)
region fwd.1 code=7 (h0, L0.q) -> (loss)
region bwd.0 code=1 time=0ns (h0, t.loss) -> (g.embed, g.n)

forward 0 (ids) -> (loss)
  gather embed
  wait embed
  run fwd.0
  release embed
  run fwd.1
end
backward 0 (t.loss) -> ()
  run bwd.0
  reduce embed (g.embed)
  accumulate embed
end
inference 1 () -> ()
end
update
  norm
  update embed
end

because zero3_compile embed "kept sharded: a \"reason\"\nin two lines \\ and a tab\t."
because zero3_compile "about the whole step"
because "my pass" "odd object" "odd names"
)";

TEST(Text, RoundTripsExactly) {
  EXPECT_EQ(print(parse_program(kEverything)), kEverything);
  EXPECT_EQ(print(parse_program(kTwoLayers)), kTwoLayers);
  EXPECT_EQ(print(StepProgram{}), "step step world=1 accumulation=1 reduce=f32\n");
}

TEST(Text, ReadsEveryField) {
  const StepProgram p = parse_program(kEverything);
  EXPECT_EQ(p.name, "llama");
  EXPECT_EQ(p.world, 2);
  EXPECT_EQ(p.accumulation, 4);
  EXPECT_TRUE(p.clip);
  EXPECT_EQ(p.reduce_dtype, DType::kBF16);
  EXPECT_FALSE(p.params[1].trainable);
  EXPECT_EQ(p.params[2].placement, Placement::kReplicated);
  EXPECT_EQ(p.params[3].members[2], "odd \"name\"");
  EXPECT_EQ(p.values[5].grad_of, (ParamRef{ParamId{3}, 2}));
  const Region& region = p.regions[0];
  EXPECT_EQ(region.workspace, Bytes{410ll << 20});
  EXPECT_EQ(region.moved, Bytes{10ll << 20});
  EXPECT_EQ(region.flops, 1'000'000);
  EXPECT_EQ(region.time, Nanos{3'000'000});
  EXPECT_EQ(std::get<ParamRef>(region.inputs[2]), (ParamRef{ParamId{3}, 1}));
  EXPECT_EQ(p.regions[1].time, std::nullopt);
  EXPECT_EQ(p.regions[2].time, Nanos{0});
  EXPECT_EQ(p.reasons[0].text, "kept sharded: a \"reason\"\nin two lines \\ and a tab\t.");
  EXPECT_EQ(p.reasons[1].object, "");
  EXPECT_EQ(p.reasons[2].object, "odd object");
}

TEST(Text, IsFreeInSpacesCommentsAndOrder) {
  const StepProgram p = parse_program(
      "# a comment\r\n\n"
      "step  s   reduce=f16 clip world=4#tight\n"
      "param w f32 64 frozen whole(a,b)\n"
      "value v 1.5KiB grad = w # spaces around =\n"
      "region r time=1us code=3(w[ 1 ],v)->()\n"
      "inference 2(v)->()\n"
      "run r\n"
      "   end # no new line at the end");
  EXPECT_EQ(print(p), R"(step s world=4 accumulation=1 clip reduce=f16

param w f32 64 whole frozen (a, b)

value v 1536B grad=w

region r code=3 time=1us (w[1], v) -> ()

inference 2 (v) -> ()
  run r
end
)");
}

struct BadText {
  const char* text;
  const char* message;
};

// Each text follows `step s world=2`, which is line 1.
const BadText kBad[] = {
    {"params a f32 1",
     "[ir] t:2:1: unknown statement 'params'. Use one of step, param, value, region, forward, "
     "backward, inference, update, because."},
    {"step again", "[ir] t:2:1: a second `step` line. Keep one program in a text."},
    {"gather a",
     "[ir] t:2:1: 'gather' stands outside of every section. Begin one with forward, backward, "
     "inference or update."},
    {"param a int8 4", "[ir] t:2:9: unknown element type 'int8'. Use f32, f16, bf16 or f64."},
    {"param a f32 4x",
     "[ir] t:2:13: '4x' is not a whole number that fits 63 bits. Write digits only."},
    {"param a f32 0", "[ir] t:2:7: param 'a': has 0 elements. Give at least 1."},
    {"param a f32 -4", "[ir] t:2:13: unexpected '-'. Remove it, or quote the name it is in."},
    {"param a f32 4 hole",
     "[ir] t:2:15: unknown word 'hole' for a parameter. Use whole, replicated or frozen."},
    {"param a f32 4 ()",
     "[ir] t:2:15: the list of members is empty. Leave it out: a parameter is its own only "
     "member."},
    {"param a f32 4\nparam a f32 4",
     "[ir] t:3:7: param 'a': a parameter has this name already. Names are unique over parameters "
     "and values: rename one of them."},
    {"value v 12",
     "[ir] t:2:9: size '12': has no unit (B, KiB, MiB, GiB, TiB). Write it as in 512B, 64KiB or "
     "1.5GiB."},
    {"value v 4B grad=w",
     "[ir] t:2:17: no parameter is named 'w'. Define it above, or correct the name."},
    {"param w f32 4\nvalue v 4B grad=w[1]",
     "[ir] t:3:17: w has 1 members and none is number 1. Members are counted from 0."},
    {"region r speed=4 () -> ()",
     "[ir] t:2:10: unknown attribute 'speed' of a region. Use code=, workspace=, moved=, flops=, "
     "time=, once or checkpoint."},
    {"region r (x) -> ()",
     "[ir] t:2:11: no value or parameter is named 'x'. Define it above, or correct the name."},
    {"region r () ()", "[ir] t:2:13: found '(' where '->' belongs. Replace it."},
    {"param w f32 4\nforward 0 (w) -> ()",
     "[ir] t:3:12: 'w' is a parameter where a value belongs. Name a value."},
    {"forward 0 () -> ()\n  gathr w",
     "[ir] t:3:3: unknown instruction 'gathr' in forward 0. Use one of gather, wait, release, run, "
     "reduce, accumulate, norm, update, defer, offload_states, evict_states, reload_states, "
     "await_states, offload, evict, reload, await, end."},
    {"forward 0 () -> ()\n  run r",
     "[ir] t:3:7: no region is named 'r'. Define it above, or correct the name."},
    {"forward 0 () -> ()\nupdate\nend",
     "[ir] t:3:1: a section begins inside forward 0. Close that one with `end` first."},
    {"forward 0 () -> ()\nend end",
     "[ir] t:3:5: found 'end' after the end of the statement. Remove it, or begin a new line."},
    {"because p \"no end",
     "[ir] t:2:11: this string has no closing quote on its line. Close it with \", or save the "
     "program again if the text was cut short."},
    {"because p \"\\q\"", "[ir] t:2:12: unknown escape \\q. Use one of \\\" \\\\ \\n \\r \\t."},
    {"because p \"\\\u20ac\"",
     "[ir] t:2:12: unknown escape of byte 0xe2. Use one of \\\" \\\\ \\n \\r \\t."},
    {"value v\x01 4B", "[ir] t:2:8: unexpected byte 0x01. Remove it, or quote the name it is in."},
};

TEST(Text, SaysWhereItIsWrong) {
  for (const BadText& bad : kBad) {
    const std::string text = std::string("step s world=2\n") + bad.text;
    EXPECT_EQ(error_of([&] { parse_program(text, "t"); }), bad.message);
  }
}

TEST(Text, SaysWhatIsWrongWithTheHeader) {
  EXPECT_EQ(error_of([] { parse_program(""); }),
            "[ir] program:1:1: the text is empty. A program begins with `step <name> "
            "world=<ranks>`.");
  EXPECT_EQ(error_of([] { parse_program("param a f32 4"); }),
            "[ir] program:1:1: a program begins with `step <name> world=<ranks>`, not with "
            "'param'. Add that line.");
  EXPECT_EQ(error_of([] { parse_program("step s world=0"); }),
            "[ir] program:1:14: world is 0. Give at least 1.");
  EXPECT_EQ(
      error_of([] { parse_program("step s phase=2"); }),
      "[ir] program:1:8: unknown header word 'phase'. Use world=, accumulation=, clip, boundary "
      "or reduce=.");
  EXPECT_EQ(error_of([] { parse_program("step s world=99999999999999999999"); }),
            "[ir] program:1:14: '99999999999999999999' is not a whole number that fits 63 bits. "
            "Write digits only.");
}

TEST(Text, ATruncatedTextIsOneClearError) {
  const std::string text = kEverything;
  const std::string in_section = text.substr(0, text.find("  release embed"));
  EXPECT_EQ(error_of([&] { parse_program(in_section, "plan.txt"); }),
            "[ir] plan.txt:22:12: the text ends inside forward 0, which began on line 19: it was "
            "cut short. Save the program again, or close the section with `end`.");
  const std::string in_line = text.substr(0, text.find("(g.embed, g.n)") + 9);
  EXPECT_EQ(error_of([&] { parse_program(in_line, "plan.txt"); }),
            "[ir] plan.txt:17:55: the line ends where a value belongs. Complete it, "
            "or save the program again if the text was cut short.");
}

// Cut anywhere before its last section, a program is refused: by the parser,
// or by the verifier because a region is never run.
TEST(Text, NoTruncationPassesUnnoticed) {
  const std::string text = kTwoLayers;
  const size_t last_run = text.rfind("run b.a") + 7;
  for (size_t length = 0; length < last_run; ++length) {
    const std::string message =
        error_of([&] { verify(parse_program(text.substr(0, length), "t")); });
    ASSERT_TRUE(message.starts_with("[ir] ")) << length << ": " << message;
  }
}

TEST(Text, PrintsPieces) {
  const StepProgram p = parse_program(kEverything);
  EXPECT_EQ(print(p, p.sections[1].instrs[1]), "reduce embed (g.embed)");
  EXPECT_EQ(print(p, p.sections[3].instrs[0]), "norm");
  EXPECT_EQ(print(p, p.regions[0].inputs[2]), "small[1]");
  EXPECT_EQ(print(p, p.regions[0].inputs[1]), "embed");
  EXPECT_EQ(section_name(p.sections[1]), "backward 0");
  EXPECT_EQ(section_name(p.sections[3]), "update");
}

}  // namespace
}  // namespace deepcompile::ir_text_test
