// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "analysis/footprint.h"
#include "analysis/memory_timeline.h"
#include "ir/text.h"
#include "test_support.h"

namespace deepcompile::analysis_memory_timeline_test {
namespace {

std::string show(const StepProgram& program, const MemoryTimeline& timeline) {
  std::string out;
  for (const MemoryAt& at : timeline.points) {
    const Section& section = program.sections[at.section];
    out += section_name(section) + ": " + print(program, section.instrs[at.instr]) + ": " +
           std::to_string(at.during.value) + " " + std::to_string(at.after.value) + "\n";
  }
  return out;
}

TEST(Footprint, DependsOnPlacementAndTypes) {
  StepProgram program = parse_program(R"(step s world=2 reduce=bf16
param sharded bf16 1000
param kept bf16 1000 whole
param all bf16 1000 replicated
param frozen bf16 1000 frozen
param wide f64 1000
)");
  const auto of = [&](const char* name) { return footprint(program, *program.find_param(name)); };
  // 1000 elements on 2 ranks: 500, padded to 512 a shard, 1024 in all.
  const ParamFootprint sharded = of("sharded");
  EXPECT_EQ(sharded.weights, Bytes{512 * 2});
  EXPECT_EQ(sharded.master, Bytes{512 * 4});
  EXPECT_EQ(sharded.moments, Bytes{512 * 8});
  EXPECT_EQ(sharded.gathered, Bytes{1024 * 2});
  EXPECT_EQ(sharded.reduction_input, Bytes{1024 * 2});
  EXPECT_EQ(sharded.reduction_result, Bytes{512 * 2});
  EXPECT_EQ(sharded.gradient, Bytes{512 * 2});
  EXPECT_EQ(of("kept").weights, Bytes{1024 * 2});
  EXPECT_EQ(of("kept").master, Bytes{512 * 4});
  EXPECT_EQ(of("kept").gathered, Bytes{0});
  EXPECT_EQ(of("all").resident(), Bytes{1024 * (2 + 4 + 8)});
  EXPECT_EQ(of("all").reduction_result, Bytes{1024 * 2});
  EXPECT_EQ(of("frozen").resident(), Bytes{512 * 2});
  EXPECT_EQ(of("frozen").gradient, Bytes{0});
  EXPECT_EQ(of("wide").master, Bytes{0});
  EXPECT_EQ(of("wide").moments, Bytes{512 * 16});
  program.accumulation = 2;  // sums are kept in fp32
  EXPECT_EQ(of("sharded").gradient, Bytes{512 * 4});
  EXPECT_EQ(of("sharded").local_sum, Bytes{0});
  program.boundary = true;  // one reduction a step, of a full-size sum in fp32, into another
  EXPECT_EQ(of("sharded").gradient, Bytes{512 * 4});
  EXPECT_EQ(of("sharded").local_sum, Bytes{1024 * 4});
  EXPECT_EQ(of("frozen").local_sum, Bytes{0});
  program.accumulation = 1;
  EXPECT_EQ(of("sharded").gradient, Bytes{512 * 2});
  EXPECT_EQ(of("sharded").local_sum, Bytes{0});
}

// f32 weights of 256 B, moments 512. On one rank the shard is what is gathered, and the gradient
// as the backward made it is what comes back and stays.
TEST(Footprint, OneRankHasNothingTwice) {
  StepProgram program = parse_program(R"(step s
param a f32 64
value x 64B
value loss 4B
value t.loss 4B
value ga 256B grad=a
region f time=1ns (x, a) -> (loss)
region b time=1ns (t.loss, x, a) -> (ga)
forward 0 (x) -> (loss)
  gather a
  wait a
  run f
  release a
end
backward 0 (t.loss) -> ()
  gather a
  wait a
  run b
  release a
  reduce a (ga)
  accumulate a
end
update
  update a
end
)");
  const int64_t resident = 256 + 512, values = 64 + 4 + 4;
  EXPECT_EQ(memory_peak(program), Bytes{resident + values + 256});
  // Of two, with shards of as many elements: ga, twice as much to send, what comes back, the loss.
  program.world = 2;
  EXPECT_EQ(memory_peak(program), Bytes{resident + 256 + 512 + 256 + 4});
}

// What two graphs reduce is added up in f32, though there is one micro batch.
TEST(Footprint, SeveralReductionsOfAStepAreATotal) {
  const std::string graph = R"(value xG 4B
value lossG 4B
value tG 4B
value gG 128B grad=a
region fG time=1ns (xG, a) -> (lossG)
region bG time=1ns (tG) -> (gG)
)";
  const std::string sections = R"(forward G (xG) -> (lossG)
  gather a
  wait a
  run fG
  release a
end
backward G (tG) -> ()
  run bG
  reduce a (gG)
  accumulate a
end
)";
  const auto gradients = [&](int graphs) {
    std::string tables, parts;
    for (int g = 0; g < graphs; ++g) {
      for (const auto& [from, to] : {std::pair(&graph, &tables), std::pair(&sections, &parts)}) {
        for (const char c : *from) c == 'G' ? * to += std::to_string(g) : * to += c;
      }
    }
    const StepProgram program = parse_program("step s world=2 reduce=bf16\nparam a bf16 64\n" +
                                              tables + parts + "update\n  update a\nend\n");
    const MemoryTimeline timeline = memory_timeline(program);
    // Before the update, less the shard's weights, master and moments and the caller's loss.
    const MemoryAt& last = timeline.points[timeline.points.size() - 2];
    return last.after.value - 64 * (2 + 4 + 8) - 4;
  };
  EXPECT_EQ(gradients(1), 64 * 2);
  EXPECT_EQ(gradients(2), 64 * 4);
}

// Shards of a and b 256 B each, norms whole 512: 1024 B of weights. Moments 512
// for each of the three: 1536. Base 2560. A gather takes 512, a reduction 512
// to send and 256 to receive, a gradient 256. A single gradient of the right size
// is sent from where it is; those of norms are copied together first.
TEST(MemoryTimeline, AddsUpByHand) {
  const StepProgram program = two_layers_zero3();
  const MemoryTimeline timeline = memory_timeline(program);
  EXPECT_EQ(timeline.base, Bytes{2560});
  EXPECT_EQ(show(program, timeline), R"(forward 0: gather a: 3328 3328
forward 0: wait a: 3328 3328
forward 0: run f.a: 4452 4352
forward 0: release a: 4352 3840
forward 0: gather b: 4352 4352
forward 0: wait b: 4352 4352
forward 0: run f.b: 6604 6404
forward 0: release b: 6404 5892
backward 0: gather b: 6408 6408
backward 0: wait b: 6408 6408
backward 0: run b.b: 8372 4996
backward 0: release b: 4996 4484
backward 0: reduce b (g.b): 4740 4740
backward 0: gather a: 5252 5252
backward 0: wait a: 5252 5252
backward 0: run b.a: 6292 4612
backward 0: release a: 4612 4100
backward 0: reduce a (g.a): 4356 4356
backward 0: accumulate b: 4356 3844
backward 0: reduce norms (g.n1, g.n0): 4612 4356
backward 0: accumulate a: 4356 3844
backward 0: accumulate norms: 3844 3332
update: update a: 3328 3072
update: update b: 3072 2816
update: update norms: 2816 2560
update: gather norms: 2560 2560
update: wait norms: 2560 2560
)");
  EXPECT_EQ(timeline.peak, Bytes{8372});
  EXPECT_EQ(timeline.peak_point, 10u);
  MemoryParts parts;
  parts.weights = {1024};
  parts.moments = {1536};
  parts.gathered = {512};
  parts.values = {256 + 1024 + 2048 + 4 + 4 + 1024 + 512 + 128};  // x h s loss t.loss d g.b g.n1
  parts.workspace = {300};
  EXPECT_EQ(timeline.at_peak, parts);
}

TEST(MemoryTimeline, AccumulatedSumsAreThereFromTheStart) {
  StepProgram program = two_layers_zero3();
  program.accumulation = 4;
  const MemoryTimeline timeline = memory_timeline(program);
  EXPECT_EQ(timeline.base, Bytes{2560});
  // 3 sums of 256 B throughout; accumulating frees a whole reduction.
  EXPECT_EQ(timeline.peak, Bytes{8372 + 768});
  EXPECT_EQ(timeline.points[18].during, Bytes{4356 + 768});
  EXPECT_EQ(timeline.points[18].after, Bytes{4356});
  EXPECT_EQ(timeline.points.back().after, Bytes{2560});
}

TEST(MemoryTimeline, WhatIsNeverReleasedIsThereInTheNextStep) {
  StepProgram program = two_layers_zero3();
  for (Section& section : program.sections) {
    std::erase_if(section.instrs, [](const Instr& instr) { return instr.op == Op::kRelease; });
  }
  const MemoryTimeline timeline = memory_timeline(program);
  EXPECT_EQ(timeline.base, Bytes{2560});
  EXPECT_EQ(timeline.points.front().after, Bytes{2560 + 256 + 1024});  // x, a and b
  EXPECT_EQ(timeline.peak, Bytes{8372 + 512});
}

}  // namespace
}  // namespace deepcompile::analysis_memory_timeline_test
