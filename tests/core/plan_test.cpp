// SPDX-License-Identifier: Apache-2.0
#include "plan/plan.h"

#include <gtest/gtest.h>

#include <string>

#include "base/error.h"
#include "ir/text.h"

namespace deepcompile::plan_test {
namespace {

constexpr const char* kProgram = R"(
step t world=2 clip
param a f32 128
param small f32 192 whole (n.weight, n.bias)
value x 64B
value unused 8B
value h 64B
value s 64B
value loss 4B
value t.loss 4B
value dh 64B
value ga 512B grad=a
value gn 256B grad=small
value gb 256B grad=small[1]
region f1 code=0 time=100ns (x, a) -> (h, s)
region f2 code=1 (h, small, small[1]) -> (loss)
region b2 code=2 (t.loss, h, small) -> (dh, gn, gb)
region b1 code=3 (dh, s, a) -> (ga)
forward 0 (x, unused) -> (loss)
  gather a
  wait a
  run f1
  release a
  run f2
end
backward 0 (t.loss) -> ()
  gather a
  wait a
  run b2
  reduce small (gn, gb)
  run b1
  release a
  reduce a (ga)
  accumulate small
  accumulate a
end
update
  norm
  update a
  update small
  gather small
  wait small
end
)";

std::string edited(const std::string& from, const std::string& to, std::string text = kProgram) {
  const size_t at = text.find(from);
  if (at == std::string::npos) throw std::runtime_error("no " + from);
  return text.replace(at, from.size(), to);
}

std::string hash_of(const std::string& text) {
  return freeze(parse_program(text)).hash;
}

std::vector<std::string> names(const Plan& plan, const std::vector<int32_t>& slots) {
  std::vector<std::string> result;
  for (int32_t slot : slots) result.push_back(plan.values.at(static_cast<size_t>(slot)));
  return result;
}

using Names = std::vector<std::string>;

TEST(Plan, HoldsTheProgramByIndices) {
  const Plan plan = freeze(parse_program(kProgram));
  EXPECT_EQ(plan.params, (Names{"a", "small"}));
  EXPECT_EQ(plan.world, 2);
  EXPECT_TRUE(plan.clip);
  ASSERT_EQ(plan.sections.size(), 3u);
  const PlanInstr& run = plan.sections[0].instrs[4];
  EXPECT_EQ(run.op, Op::kRun);
  const PlanRegion& region = plan.regions.at(static_cast<size_t>(run.region));
  EXPECT_EQ(region.code, 1u);
  // h, then both members of the pack.
  const std::vector<PlanOperand> inputs = {{false, 2, 0}, {true, 1, 0}, {true, 1, 1}};
  EXPECT_EQ(region.inputs, inputs);
  const PlanInstr& reduce = plan.sections[1].instrs[3];
  EXPECT_EQ(names(plan, reduce.values), (Names{"gn", "gb"}));
  EXPECT_EQ(reduce.members, (std::vector<int32_t>{0, 1}));
}

TEST(Plan, FreesValuesAfterTheirLastUse) {
  const Plan plan = freeze(parse_program(kProgram));
  const auto& forward = plan.sections[0].instrs;
  const auto& backward = plan.sections[1].instrs;
  EXPECT_EQ(names(plan, forward[0].frees), (Names{"unused"}));
  EXPECT_EQ(names(plan, forward[2].frees), (Names{"x"}));  // s waits for the backward
  EXPECT_EQ(names(plan, forward[4].frees), (Names{}));     // h too; the caller takes loss
  EXPECT_EQ(names(plan, backward[2].frees), (Names{"h", "t.loss"}));
  EXPECT_EQ(names(plan, backward[3].frees), (Names{"gn", "gb"}));
  EXPECT_EQ(names(plan, backward[4].frees), (Names{"s", "dh"}));
  EXPECT_EQ(names(plan, backward[6].frees), (Names{"ga"}));
}

TEST(Plan, TextRoundTrips) {
  const Plan plan = freeze(parse_program(kProgram));
  EXPECT_EQ(parse_plan(serialize(plan)), plan);
  EXPECT_EQ(serialize(parse_plan(serialize(plan))), serialize(plan));
}

TEST(Plan, HashIsOfTheContent) {
  const std::string hash = hash_of(kProgram);
  EXPECT_EQ(hash.size(), 16u);
  EXPECT_EQ(hash, hash_of(kProgram));
  // Times and sizes have no part in it.
  EXPECT_EQ(hash, hash_of(edited("time=100ns", "time=7ms")));
  EXPECT_EQ(hash, hash_of(edited(" time=100ns", "")));
  EXPECT_EQ(hash, hash_of(edited("value h 64B", "value h 1MiB")));
  // Instructions, code and header have.
  EXPECT_NE(hash, hash_of(edited("  release a\n  run f2\n", "  run f2\n  release a\n")));
  EXPECT_NE(hash, hash_of(edited("code=3", "code=4")));
  EXPECT_NE(hash, hash_of(edited("world=2", "world=4")));
}

TEST(Plan, RefusesProgramsThatCannotRun) {
  EXPECT_THROW(freeze(parse_program(edited("  wait a\n", ""))), UserError);
  EXPECT_THROW(freeze(parse_program(edited("  accumulate a\n", ""))), UserError);
}

void expect_error(const std::string& text, const std::string& part) {
  try {
    parse_plan(text);
    FAIL() << "no error; expected " << part;
  } catch (const UserError& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(Plan, ParserNamesTheDefect) {
  const std::string text = serialize(freeze(parse_program(kProgram)));
  expect_error("", "line 1, column 1: the JSON text ends too early");
  expect_error(text.substr(0, text.size() / 2), "ends too early");
  expect_error("[]", "must be an object");
  expect_error(edited("\"world\": 2", "\"world\": 0", text), "world: must be from 1");
  expect_error(edited("\"world\"", "\"wold\"", text), "unknown key \"wold\"");
  expect_error(edited("\"op\":\"norm\"", "\"op\":\"morn\"", text),
               "sections[2].instrs[0].op: unknown instruction \"morn\"");
  expect_error(edited("\"param\":1", "\"param\":9", text), "index 9 is outside the table");
  expect_error(edited("\"kind\": \"update\"", "\"kind\": \"upside\"", text), "unknown kind");
  expect_error(edited("\"version\": 2", "\"version\": 3", text), "reads version 2, not 3");
  // A change that is well formed is found by the hash.
  expect_error(edited("\"clip\": true", "\"clip\": false", text), "hash: is ");
}

}  // namespace
}  // namespace deepcompile::plan_test
