// SPDX-License-Identifier: Apache-2.0
// What must hold for every simulation and every plan, on random programs.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "analysis/liveness.h"
#include "analysis/memory_timeline.h"
#include "critical_path.h"
#include "passes/pipeline.h"
#include "plan/plan.h"
#include "random_program.h"
#include "sim/simulator.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::sim_random_test {
namespace {

constexpr uint32_t kSeeds = 300;

StepProgram planned(uint32_t seed) {
  StepProgram program = random_program(seed, {.replicated = seed % 5 == 0});
  std::mt19937 random(seed);
  for (Region& region : program.regions) region.time = Nanos{pick(random, 0, 20000)};
  run_pipeline(program, PassRegistry::with_builtins(),
               {seed % 5 == 0 ? "zero0_compile" : "zero3_compile"});
  return program;
}

// The plan with some updates deferred, some states and saved values moved to
// the host and back, gradients summed locally or not: all that a step may hold.
class Decorator {
 public:
  explicit Decorator(uint32_t seed) : random_(seed), program_(planned(seed)) {
    program_.boundary = chance(3);
    const Liveness liveness = analyze_liveness(program_);
    for (size_t s = 0; s < program_.sections.size(); ++s) {
      Section& section = program_.sections[s];
      if (section.kind == SectionKind::kUpdate) decorate_update(section);
      if (section.kind == SectionKind::kForward) {
        offload(section, program_.find_section(SectionKind::kBackward, section.graph),
                liveness.sections[s].saved);
      }
    }
  }

  StepProgram take() { return std::move(program_); }

 private:
  bool chance(int64_t n) { return pick(random_, 1, n) == 1; }

  void decorate_update(Section& section) {
    std::vector<Instr> out;
    for (Instr instr : section.instrs) {
      if (instr.op != Op::kUpdate) {
        out.push_back(instr);
        continue;
      }
      const auto states = [&](Op op) { out.push_back({op, instr.param, std::nullopt, {}}); };
      const bool moves = chance(2), late = chance(2);
      if (can_defer(*instr.param) && chance(2)) instr.op = Op::kDefer;
      if (moves && late) states(Op::kReloadStates);
      if (moves && late) states(Op::kAwaitStates);
      out.push_back(instr);
      if (moves) states(Op::kOffloadStates);
      if (moves) states(Op::kEvictStates);
    }
    section.instrs = std::move(out);
  }

  // Only if the next step gathers it before it has another gradient.
  bool can_defer(ParamId id) const {
    if (program_.param(id).placement != Placement::kSharded) return false;
    for (const Section& section : program_.sections) {
      if (section.kind == SectionKind::kUpdate) continue;
      for (const Instr& instr : section.instrs) {
        if (instr.param != id) continue;
        if (instr.op == Op::kGather || instr.op == Op::kReduce) return instr.op == Op::kGather;
      }
    }
    return false;
  }

  void offload(Section& section, std::optional<SectionId> backward,
               const std::vector<ValueId>& saved) {
    Instr instr{Op::kOffload, std::nullopt, std::nullopt, {}};
    for (ValueId id : saved) {
      if (chance(2) && !is_callers(id)) instr.values.push_back(id);
    }
    if (instr.values.empty()) return;
    const auto with = [&](Op op) {
      instr.op = op;
      return instr;
    };
    section.instrs.push_back(with(Op::kOffload));
    section.instrs.push_back(with(Op::kEvict));
    auto& instrs = program_.sections[index(*backward)].instrs;
    instrs.insert(instrs.begin(), {with(Op::kReload), with(Op::kAwait)});
  }

  bool is_callers(ValueId id) const {
    const auto has = [&](const std::vector<ValueId>& ids) {
      return std::find(ids.begin(), ids.end(), id) != ids.end();
    };
    return std::any_of(program_.sections.begin(), program_.sections.end(),
                       [&](const Section& each) { return has(each.inputs) || has(each.outputs); });
  }

  std::mt19937 random_;
  StepProgram program_;
};

StepProgram decorated(uint32_t seed) {
  return Decorator(seed).take();
}

TEST(RandomSimulations, AgreeWithTheTimelineWhateverAPlanDoes) {
  int deferred = 0, copied = 0;
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    const StepProgram program = decorated(seed);
    UnitCost costs;
    costs.slowdown = 1 + 0.25 * (seed % 4);
    if (seed % 3 == 0) costs.beside = {.to_device = 0.55, .to_host = 0.88};
    const SimResult result = simulate(program, costs);
    const MemoryTimeline timeline = memory_timeline(program);
    ASSERT_EQ(result.peak, timeline.peak) << seed;
    ASSERT_EQ(timeline.at_peak.total(), timeline.peak) << seed;
    ASSERT_EQ(memory_peak(program), timeline.peak) << seed;
    ASSERT_EQ(result.memory.back().bytes, result.resident) << seed;
    ASSERT_EQ(result.memory.front().time, Nanos{0}) << seed;
    for (const MemoryAt& point : timeline.points) {
      ASSERT_LE(point.after, point.during) << seed;
      ASSERT_LE(point.during, timeline.peak) << seed;
    }
    const SimSummary summary = simulate_summary(program, costs);
    ASSERT_EQ(summary.time, result.time) << seed;
    ASSERT_EQ(summary.peak, result.peak) << seed;
    for (Nanos busy : {result.compute_busy + result.stall, result.link_busy, result.to_host_busy,
                       result.to_device_busy}) {
      ASSERT_LE(busy, result.time) << seed;
    }
    copied += result.to_host_busy > Nanos{0} ? 1 : 0;
    for (const SimItem& item : result.items) {
      const Op op = program.sections[item.section].instrs[item.instr].op;
      deferred += op == Op::kGather && item.op == Op::kUpdate ? 1 : 0;
    }
    StepProgram once = program;
    once.accumulation = 1;
    const CriticalPath path = critical_path(
        once, [&](const Section&, const Instr& instr) { return costs.duration(once, instr); });
    ASSERT_LE(path.length, simulate(once, costs).time) << seed;
  }
  EXPECT_GT(deferred, 50);
  EXPECT_GT(copied, 50);
}

TEST(RandomSimulations, ResourcesDoOneThingAtATime) {
  for (uint32_t seed = 0; seed < 2 * kSeeds; ++seed) {
    const StepProgram program = seed < kSeeds ? planned(seed) : decorated(seed);
    UnitCost costs;
    costs.slowdown = 1 + 0.25 * (seed % 4);
    if (seed % 3 == 0) costs.beside = {.to_device = 0.55, .to_host = 0.88};
    const SimResult result = simulate(program, costs);
    std::map<Resource, Nanos> end, busy;
    Nanos stall;
    for (const SimItem& item : result.items) {
      stall += item.stall;
      ASSERT_LE(item.issue, item.start) << seed;
      ASSERT_LE(item.start, item.end) << seed;
      ASSERT_LE(item.end, result.time) << seed;
      if (item.resource == Resource::kNone) continue;
      ASSERT_GE(item.start, end[item.resource]) << seed;
      end[item.resource] = item.end;
      busy[item.resource] += item.end - item.start;
    }
    ASSERT_EQ(busy[Resource::kCompute], result.compute_busy) << seed;
    ASSERT_EQ(busy[Resource::kLink], result.link_busy) << seed;
    ASSERT_EQ(busy[Resource::kToHost], result.to_host_busy) << seed;
    ASSERT_EQ(busy[Resource::kToDevice], result.to_device_busy) << seed;
    // Compute either works or stands still; then the link may go on.
    ASSERT_EQ(stall, result.stall) << seed;
    const Nanos compute = result.compute_busy + result.stall;
    ASSERT_EQ(result.time, std::max(compute, end[Resource::kLink])) << seed;
  }
}

TEST(RandomSimulations, NeverBeatTheCriticalPath) {
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    StepProgram program = planned(seed);
    program.accumulation = 1;
    const UnitCost costs;
    const CriticalPath path = critical_path(program, [&](const Section&, const Instr& instr) {
      return costs.duration(program, instr);
    });
    const SimResult result = simulate(program, costs);
    ASSERT_GE(result.time, path.length) << seed;
    ASSERT_GE(result.time, result.link_busy) << seed;
    ASSERT_GE(result.time, result.compute_busy) << seed;
    // Slower kernels cannot make a step faster.
    UnitCost slow;
    slow.slowdown = 2;
    ASSERT_GE(simulate(program, slow).time, result.time) << seed;
  }
}

TEST(RandomSimulations, MemoryComesBackAndStaysUnderTheTimeline) {
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    const StepProgram program = planned(seed);
    const SimResult result = simulate(program, UnitCost());
    const MemoryTimeline timeline = memory_timeline(program);
    ASSERT_EQ(result.resident, timeline.base) << seed;
    // The timeline has a point for each instruction, so none for an empty section's inputs.
    const bool empty = std::any_of(program.sections.begin(), program.sections.end(),
                                   [](const Section& section) { return section.instrs.empty(); });
    if (!empty) {
      ASSERT_LE(result.peak, timeline.peak) << seed;
    }
    Bytes highest;
    for (const MemoryPoint& point : result.memory) {
      ASSERT_GE(point.bytes, result.resident) << seed;
      highest = std::max(highest, point.bytes);
    }
    ASSERT_GE(result.peak, highest) << seed;
    ASSERT_EQ(result.memory.back().bytes, result.resident) << seed;
  }
}

TEST(RandomSimulations, AreDeterministic) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    const SimResult a = simulate(planned(seed), UnitCost());
    const SimResult b = simulate(planned(seed), UnitCost());
    ASSERT_EQ(a.time, b.time);
    ASSERT_EQ(a.memory, b.memory);
  }
}

TEST(RandomPlans, RoundTripAndFreeOnce) {
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    const Plan plan = freeze(planned(seed));
    ASSERT_EQ(parse_plan(serialize(plan)), plan) << seed;
    for (const PlanSection& section : plan.sections) {
      std::set<int32_t> freed;
      for (const PlanInstr& instr : section.instrs) {
        for (int32_t value : instr.values) ASSERT_FALSE(freed.contains(value)) << seed;
        for (int32_t value : instr.frees) ASSERT_TRUE(freed.insert(value).second) << seed;
      }
      for (int32_t value : section.outputs) ASSERT_FALSE(freed.contains(value)) << seed;
    }
  }
}

// A text cut or damaged anywhere is an error or, rarely, still a plan; never a crash.
TEST(RandomPlans, DamagedTextIsAnError) {
  const std::string text = serialize(freeze(planned(3)));
  std::mt19937 random(1);
  for (int i = 0; i < 400; ++i) {
    std::string damaged = text;
    const auto at = static_cast<size_t>(pick(random, 0, static_cast<int64_t>(text.size()) - 1));
    if (i % 2 == 0) {
      damaged.resize(at);
    } else {
      damaged[at] = static_cast<char>(pick(random, 1, 126));
    }
    try {
      const Plan plan = parse_plan(damaged);
      ASSERT_EQ(plan.hash, content_hash(plan));
    } catch (const UserError&) {
    }
  }
}

}  // namespace
}  // namespace deepcompile::sim_random_test
