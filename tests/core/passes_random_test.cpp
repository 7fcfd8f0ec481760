// SPDX-License-Identifier: Apache-2.0
// Random programs through parser, verifier, passes and analysis; and edits
// that break them, which the verifier must refuse.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "analysis/liveness.h"
#include "analysis/memory_timeline.h"
#include "critical_path.h"
#include "ir/text.h"
#include "ir/verifier.h"
#include "passes/pipeline.h"
#include "random_program.h"
#include "test_support.h"

namespace deepcompile::passes_random_test {
namespace {

constexpr uint32_t kSeeds = 400;

StepProgram zero3(uint32_t seed) {
  StepProgram program = random_program(seed);
  run_pipeline(program, PassRegistry::with_builtins(), {"zero3_compile"});
  return program;
}

size_t count(const StepProgram& program, Op op) {
  size_t out = 0;
  for (const Section& section : program.sections) {
    out += static_cast<size_t>(std::count_if(section.instrs.begin(), section.instrs.end(),
                                             [&](const Instr& instr) { return instr.op == op; }));
  }
  return out;
}

TEST(RandomPrograms, AreValidAndRoundTrip) {
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    const StepProgram program = random_program(seed);
    ASSERT_EQ(error_of([&] { verify(program); }), "no error") << seed;
    const std::string text = print(program);
    ASSERT_EQ(print(parse_program(text)), text) << seed;
  }
}

TEST(RandomPrograms, ZeroPassesCompleteThem) {
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    const StepProgram three = zero3(seed);
    ASSERT_EQ(error_of([&] { verify_plan(three); }), "no error") << seed;
    const std::string text = print(three);
    ASSERT_EQ(print(parse_program(text)), text) << seed;
    ASSERT_EQ(print(zero3(seed)), text) << seed;  // a function of the program

    StepProgram zero = random_program(seed, {.replicated = true});
    run_pipeline(zero, PassRegistry::with_builtins(), {"zero0_compile"});
    ASSERT_EQ(error_of([&] { verify_plan(zero); }), "no error") << seed;
    // Stage 0 and 3 reduce the same gradients in the same order.
    const auto reductions = [](const StepProgram& program) {
      std::vector<std::string> out = collective_order(program);
      std::erase_if(
          out, [](const std::string& call) { return call.find(": gather ") != std::string::npos; });
      return out;
    };
    ASSERT_EQ(order_difference(reductions(three), reductions(zero)), std::nullopt) << seed;
  }
}

// Where values die, worked out again the slow way.
TEST(RandomPrograms, LivenessAgreesWithASlowSearch) {
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    const StepProgram program = zero3(seed);
    const Liveness liveness = analyze_liveness(program);
    std::map<ValueId, std::pair<size_t, size_t>> last;  // section, instruction
    for (size_t s = 0; s < program.sections.size(); ++s) {
      const Section& section = program.sections[s];
      for (ValueId id : section.inputs) last[id] = {s, 0};
      for (size_t i = 0; i < section.instrs.size(); ++i) {
        const Instr& instr = section.instrs[i];
        for (ValueId id : instr.values) last[id] = {s, i};
        if (instr.op != Op::kRun) continue;
        for (ValueId id : program.region(*instr.region).outputs) last[id] = {s, i};
        for (const Operand& each : program.region(*instr.region).inputs) {
          if (const auto* id = std::get_if<ValueId>(&each)) last[*id] = {s, i};
        }
      }
      for (ValueId id : section.outputs) last[id] = {s, SIZE_MAX};  // handed over
    }
    std::map<ValueId, std::pair<size_t, size_t>> freed;
    for (size_t s = 0; s < program.sections.size(); ++s) {
      for (size_t i = 0; i < program.sections[s].instrs.size(); ++i) {
        for (ValueId id : liveness.sections[s].frees[i]) {
          ASSERT_TRUE(freed.emplace(id, std::pair(s, i)).second) << seed << " freed twice";
        }
      }
    }
    std::erase_if(last, [&](const auto& each) {
      return each.second.second == SIZE_MAX || program.sections[each.second.first].instrs.empty();
    });
    ASSERT_EQ(freed, last) << seed;
  }
}

TEST(RandomPrograms, MemoryReturnsToItsBase) {
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    const StepProgram program = zero3(seed);
    const MemoryTimeline timeline = memory_timeline(program);
    ASSERT_GE(timeline.peak, timeline.base) << seed;
    ASSERT_EQ(timeline.at_peak.total(), timeline.peak) << seed;
    if (count(program, Op::kUpdate) > 0) {
      ASSERT_EQ(timeline.points.back().after, timeline.base) << seed;
    }
    for (const MemoryAt& at : timeline.points) {
      ASSERT_LE(at.after, at.during) << seed;
      ASSERT_LE(at.during, timeline.peak) << seed;
    }
    ASSERT_EQ(count(program, Op::kReduce), count(program, Op::kAccumulate)) << seed;
    const InstrTime one = [](const Section&, const Instr&) { return Nanos{1}; };
    ASSERT_GE(critical_path(program, one).length.value,
              static_cast<int64_t>(count(program, Op::kRun)))
        << seed;
  }
}

// --- edits that break a complete program ------------------------------------

using Place = std::pair<size_t, size_t>;  // section, instruction

std::vector<Place> places(const StepProgram& program, Op op) {
  std::vector<Place> out;
  for (size_t s = 0; s < program.sections.size(); ++s) {
    for (size_t i = 0; i < program.sections[s].instrs.size(); ++i) {
      if (program.sections[s].instrs[i].op == op) out.emplace_back(s, i);
    }
  }
  return out;
}

void drop(StepProgram& program, Place at) {
  auto& instrs = program.sections[at.first].instrs;
  instrs.erase(instrs.begin() + static_cast<std::ptrdiff_t>(at.second));
}

void repeat(StepProgram& program, Place at) {
  auto& instrs = program.sections[at.first].instrs;
  const Instr copy = instrs[at.second];
  instrs.insert(instrs.begin() + static_cast<std::ptrdiff_t>(at.second), copy);
}

// One place before: a release before the last use, a reduce before its run.
void raise(StepProgram& program, Place at) {
  auto& instrs = program.sections[at.first].instrs;
  std::swap(instrs[at.second], instrs[at.second - 1]);
}

// Moves a release in front of the nearest run that uses its parameter.
void release_early(StepProgram& program, Place at) {
  auto& instrs = program.sections[at.first].instrs;
  while (instrs[at.second].op != Op::kRun) {
    raise(program, at);
    --at.second;
    if (instrs[at.second + 1].op == Op::kRun) return;
  }
}

struct Breakage {
  const char* name;
  Op op;
  void (*edit)(StepProgram&, Place);
};
const Breakage kBreakages[] = {
    {"drop a gather", Op::kGather, drop},
    {"drop a wait", Op::kWait, drop},
    {"drop a run", Op::kRun, drop},
    {"repeat a run", Op::kRun, repeat},
    {"repeat a release", Op::kRelease, repeat},
    {"release early", Op::kRelease, release_early},
    {"wait before the gather", Op::kWait,
     [](StepProgram& program, Place at) {
       auto& instrs = program.sections[at.first].instrs;
       const Instr wait = instrs[at.second];
       drop(program, at);
       instrs.insert(instrs.begin(), wait);
     }},
    {"drop a reduce", Op::kReduce, drop},
    {"repeat a reduce", Op::kReduce, repeat},
    {"reduce a part", Op::kReduce,
     [](StepProgram& program, Place at) {
       program.sections[at.first].instrs[at.second].values.pop_back();
     }},
    {"drop an accumulate", Op::kAccumulate, drop},
    {"repeat an accumulate", Op::kAccumulate, repeat},
    {"drop the norm", Op::kNorm, drop},
    {"norm after an update", Op::kNorm,
     [](StepProgram& program, Place at) {
       auto& instrs = program.sections[at.first].instrs;
       const Instr norm = instrs[at.second];
       drop(program, at);
       instrs.push_back(norm);
     }},
    {"drop an update", Op::kUpdate, drop},
    {"repeat an update", Op::kUpdate, repeat},
};

// Updates may be absent, and a norm behind nothing is where it should be.
bool applies(const Breakage& breakage, const StepProgram& program) {
  return std::string(breakage.name) != "norm after an update" && breakage.op != Op::kNorm
             ? true
             : count(program, Op::kUpdate) > 0;
}

TEST(RandomPrograms, BrokenOnesAreRefused) {
  std::map<std::string, int> tried;
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    const StepProgram program = zero3(seed);
    std::mt19937 random(seed);
    for (const Breakage& breakage : kBreakages) {
      const std::vector<Place> at = places(program, breakage.op);
      if (at.empty() || !applies(breakage, program)) continue;
      StepProgram broken = program;
      const auto which = static_cast<size_t>(pick(random, 0, static_cast<int64_t>(at.size()) - 1));
      breakage.edit(broken, at[which]);
      const std::string message = error_of([&] { verify_plan(broken); });
      ASSERT_TRUE(message.starts_with("[ir] random: "))
          << breakage.name << ", seed " << seed << ": " << message << "\n"
          << sections_text(broken);
      ++tried[breakage.name];
    }
  }
  for (const Breakage& breakage : kBreakages) EXPECT_GT(tried[breakage.name], 50) << breakage.name;
}

// What optimising passes will do keeps a program valid.
TEST(RandomPrograms, EarlierGathersAndFewerReleasesAreAccepted) {
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    StepProgram program = zero3(seed);
    std::mt19937 random(seed);
    for (Section& section : program.sections) {
      if (section.kind == SectionKind::kUpdate) continue;
      std::erase_if(section.instrs, [&](const Instr& i) {
        return i.op == Op::kRelease && pick(random, 0, 1) == 0;
      });
      for (size_t i = 0; i < section.instrs.size(); ++i) {
        if (section.instrs[i].op != Op::kGather) continue;
        const auto to = pick(random, 0, static_cast<int64_t>(i));
        std::rotate(section.instrs.begin() + to, section.instrs.begin() + static_cast<int64_t>(i),
                    section.instrs.begin() + static_cast<int64_t>(i) + 1);
      }
    }
    ASSERT_EQ(error_of([&] { verify_plan(program); }), "no error") << seed << "\n"
                                                                   << sections_text(program);
    ASSERT_EQ(error_of([&] { memory_timeline(program); }), "no error") << seed;
  }
}

// A text with one character changed is a program or one UserError, never worse.
TEST(RandomPrograms, DamagedTextsNeverCrash) {
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    std::string text = print(zero3(seed));
    std::mt19937 random(seed);
    for (int i = 0; i < 8; ++i) {
      const auto at = static_cast<size_t>(pick(random, 0, static_cast<int64_t>(text.size()) - 1));
      std::string damaged = text;
      damaged[at] = static_cast<char>(pick(random, 0, 255));
      const std::string message = error_of([&] { verify(parse_program(damaged)); });
      ASSERT_TRUE(message == "no error" || message.starts_with("[ir] ")) << message;
    }
  }
}

}  // namespace
}  // namespace deepcompile::passes_random_test
