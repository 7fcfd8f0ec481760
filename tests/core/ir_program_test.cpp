// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "ir/program.h"
#include "test_support.h"

namespace deepcompile::ir_program_test {
namespace {

Param param(std::string name, int64_t numel = 128) {
  Param out;
  out.name = std::move(name);
  out.numel = numel;
  return out;
}

TEST(Program, ShardsAreEqualAndAligned) {
  EXPECT_EQ(shard_numel(1, 1), 64);
  EXPECT_EQ(shard_numel(64, 1), 64);
  EXPECT_EQ(shard_numel(65, 1), 128);
  EXPECT_EQ(shard_numel(256, 4), 64);
  EXPECT_EQ(shard_numel(257, 4), 128);            // 65 a rank, rounded up
  EXPECT_EQ(shard_numel(1'000'000, 3), 333'376);  // 333'334, rounded up
}

TEST(Program, CountsTheBytesOfParameters) {
  StepProgram program;
  program.world = 2;
  Param bf16 = param("w", 1000);  // 500 a rank, 512 with padding
  bf16.dtype = DType::kBF16;
  const ParamId id = program.add_param(bf16);
  EXPECT_EQ(program.shard_bytes(id), Bytes{1024});
  EXPECT_EQ(program.full_bytes(id), Bytes{2048});
  EXPECT_EQ(program.param(id).members, std::vector<std::string>{"w"});
}

TEST(Program, DTypesHaveSizesAndNames) {
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64}) {
    DType parsed{};
    EXPECT_TRUE(parse_dtype(to_string(dtype), &parsed));
    EXPECT_EQ(parsed, dtype);
  }
  DType unused{};
  EXPECT_FALSE(parse_dtype("int8", &unused));
  EXPECT_EQ(element_size(DType::kBF16), 2);
  EXPECT_EQ(element_size(DType::kF64), 8);
}

TEST(Program, EveryOpHasTraits) {
  for (int i = 0; i < kOpCount; ++i) {
    const Op op = static_cast<Op>(i);
    EXPECT_EQ(parse_op(traits(op).name), op);
  }
  EXPECT_EQ(parse_op("gathr"), std::nullopt);
  EXPECT_TRUE(traits(Op::kReduce).is_collective);
  EXPECT_TRUE(traits(Op::kNorm).is_collective);
  EXPECT_FALSE(traits(Op::kUpdate).is_collective);
}

TEST(Program, FindsByName) {
  StepProgram program;
  const ParamId p = program.add_param(param("p"));
  const ValueId v = program.add_value({"v", Bytes{4}, {}});
  Region region;
  region.name = "r";
  region.inputs = {v, ParamRef{p, 0}};
  const RegionId r = program.add_region(region);
  program.sections.push_back({SectionKind::kInference, 3, {v}, {}, {}});
  EXPECT_EQ(program.find_param("p"), p);
  EXPECT_EQ(program.find_value("v"), v);
  EXPECT_EQ(program.find_region("r"), r);
  EXPECT_EQ(program.find_param("v"), std::nullopt);
  EXPECT_EQ(program.find_value("p"), std::nullopt);
  EXPECT_EQ(program.find_region("p"), std::nullopt);
  EXPECT_EQ(program.find_section(SectionKind::kInference, 3), SectionId{0});
  EXPECT_EQ(program.find_section(SectionKind::kForward, 3), std::nullopt);
}

TEST(Program, RejectsWhatCannotBe) {
  StepProgram program;
  const ParamId p = program.add_param(param("p"));
  EXPECT_EQ(error_of([&] { program.add_param(param("a b")); }),
            "[ir] param 'a b': is not a name. Use letters, digits and _ . : / -, and begin with a "
            "letter, a digit or _.");
  EXPECT_EQ(error_of([&] {
              program.add_value({"p", Bytes{4}, {}});
            }),
            "[ir] value 'p': a parameter has this name already. Names are unique over parameters "
            "and values: rename one of them.");
  EXPECT_EQ(error_of([&] { program.add_param(param("empty", 0)); }),
            "[ir] param 'empty': has 0 elements. Give at least 1.");
  EXPECT_EQ(error_of([&] {
              program.add_value({"v", Bytes{-1}, {}});
            }),
            "[ir] value 'v': size in bytes is -1. Give a number that is not negative.");
  EXPECT_EQ(error_of([&] { program.add_param(param("huge", INT64_MAX)); }),
            "[ir] param 'huge': number of elements is 9223372036854775807, and 281474976710656 is "
            "the most there can be.");
  EXPECT_EQ(error_of([&] {
              program.add_value({"v", Bytes{INT64_MAX}, {}});
            }),
            "[ir] value 'v': size in bytes is 9223372036854775807, and 281474976710656 is the most "
            "there can be.");
  EXPECT_EQ(error_of([&] {
              program.add_value({"v", Bytes{4}, ParamRef{p, 1}});
            }),
            "[ir] value 'v': names member 1 of p, which has 1. Members are counted from 0.");
  Region region;
  region.name = "r";
  region.outputs = {ValueId{7}};
  EXPECT_EQ(error_of([&] { program.add_region(region); }),
            "[ir] region 'r': names value 7 of 0. Add the value first.");
  region.outputs.clear();
  program.add_region(region);
  EXPECT_EQ(error_of([&] { program.add_region(region); }),
            "[ir] region 'r': another region has this name. Rename one of them.");
}

}  // namespace
}  // namespace deepcompile::ir_program_test
