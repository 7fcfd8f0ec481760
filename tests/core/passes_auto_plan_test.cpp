// SPDX-License-Identifier: Apache-2.0
// `auto` against every combination of its edits on small programs, against the
// classical plan on random ones, and its errors and reasons.
#include <gtest/gtest.h>

#include <algorithm>

#include "analysis/memory_timeline.h"
#include "ir/verifier.h"
#include "layered_program.h"
#include "passes/auto/plan.h"
#include "passes/auto/read_choice.h"
#include "passes/auto/search.h"
#include "planned_for.h"
#include "random_program.h"
#include "test_support.h"
#include "unit_cost.h"

namespace deepcompile::passes_auto_plan_test {
namespace {

// Kernels beside transfers take a tenth longer; copies to and from the host are
// as fast as the link.
UnitCost unit_costs() {
  UnitCost costs;
  costs.slowdown = 1.1;
  return costs;
}

// A chain of layers, each with a parameter, saved values and a backward.
StepProgram chain(uint32_t seed, int layers) {
  std::mt19937 random(seed);
  const auto number = [&](int64_t low, int64_t high) {
    return std::to_string(pick(random, low, high));
  };
  std::string params, values = "value x 256B\nvalue t 4B\n", regions, forward, backward;
  for (int i = 0; i < layers; ++i) {
    const std::string n = std::to_string(i);
    const std::string in = i == 0 ? "x" : "h" + std::to_string(i - 1);
    const std::string d = i + 1 == layers ? "t" : "d" + std::to_string(i + 1);
    params +=
        "param p" + n + (pick(random, 0, 1) == 0 ? " bf16 " : " f32 ") + number(1, 8) + "00\n";
    values += "value h" + n + " " + number(1, 20) + "00B\nvalue s" + n + " " + number(1, 60) +
              "00B\nvalue d" + n + " 400B\nvalue g" + n + " 400B grad=p" + n + "\n";
    regions += "region f" + n + " code=" + n + " time=" + number(1, 20) + "00ns (" + in + ", p" +
               n + ") -> (h" + n + ", s" + n + ")\n";
    regions += "region b" + n + " code=9" + n + " workspace=" + number(0, 9) +
               "00B time=" + number(2, 30) + "00ns (" + d + ", " + in + ", s" + n + ", p" + n +
               ") -> (d" + n + ", g" + n + ")\n";
    forward += "  run f" + n + "\n";
    backward = "  run b" + n + "\n" + backward;
  }
  return parse_program("step chain world=2" + std::string(pick(random, 0, 2) == 0 ? " clip" : "") +
                       "\n" + params + values + regions + "forward 0 (x) -> (h" +
                       std::to_string(layers - 1) + ")\n" + forward +
                       "end\nbackward 0 (t) -> ()\n" + backward + "end\nupdate\nend\n");
}

// What the bits of `set` stand for.
template <typename T>
std::vector<T> subset(const std::vector<T>& all, size_t set) {
  std::vector<T> out;
  for (size_t i = 0; i < all.size(); ++i) {
    if (set >> i & 1) out.push_back(all[i]);
  }
  return out;
}

// Every subset of what can run again, of values, states and gaps, every place, and gathers ahead
// in each section or not.
class Exhaustive {
 public:
  Exhaustive(const StepProgram& plain, const PassEnvironment& environment)
      : builder_(plain, environment), menu_(builder_.classical(), *environment.estimator) {
    for (const RecomputeUnit& unit : menu_.recompute()) {
      regions_.insert(regions_.end(), unit.regions.begin(), unit.regions.end());
    }
    std::sort(regions_.begin(), regions_.end());
    for (const Section& section : plain.sections) sections_ += section.kind != SectionKind::kUpdate;
  }

  Found best() {
    Found best{{}, {Nanos{INT64_MAX}, Bytes{INT64_MAX}, false}};
    for (size_t r = 0; r < size_t{1} << regions_.size(); ++r) {
      AutoChoice choice;
      choice.recompute = subset(regions_, r);
      std::vector<ValueId> values;
      for (const Movable& each : menu_.values(choice.recompute)) {
        if (!made_again(choice, ValueId{each.id})) values.push_back(ValueId{each.id});
      }
      std::sort(values.begin(), values.end());
      for (size_t v = 0; v < size_t{1} << values.size(); ++v) {
        choice.offload_values = subset(values, v);
        states(choice, &best);
      }
    }
    return best;
  }
  size_t tried() const { return tried_; }

 private:
  bool made_again(const AutoChoice& choice, ValueId id) const {
    return std::any_of(choice.recompute.begin(), choice.recompute.end(), [&](RegionId region) {
      const auto& outputs = builder_.classical().region(region).outputs;
      return std::find(outputs.begin(), outputs.end(), id) != outputs.end();
    });
  }

  void states(AutoChoice choice, Found* best) {
    std::vector<ParamId> all;
    for (const Movable& each : menu_.states()) all.push_back(ParamId{each.id});
    std::sort(all.begin(), all.end());
    for (size_t away = 0; away < size_t{1} << all.size(); ++away) {
      choice.offload_states = subset(all, away);
      choice.place = Place::kStep;
      keep(choice, best);
      choice.place = Place::kNextForward;
      keep(choice, best);
      choice.place = Place::kBackward;
      if (builder_.early_updates()) keep(choice, best);
    }
  }

  void keep(AutoChoice choice, Found* best) {
    std::vector<GapId> gaps;
    for (const Gap& gap : builder_.gaps(choice)) {
      if (gap.saved > Nanos{0}) gaps.push_back(gap.id);
    }
    for (size_t k = 0; k < size_t{1} << gaps.size(); ++k) {
      choice.keep = subset(gaps, k);
      for (size_t l = 0; l < size_t{1} << sections_; ++l) {
        choice.limits.assign(builder_.classical().sections.size(), Bytes{-1});
        for (size_t s = 0; s < sections_; ++s) {
          if (l >> s & 1) choice.limits[s] = Bytes{1 << 20};
        }
        const Trial trial = builder_.measure(choice);
        ++tried_;
        if (better(trial, best->trial)) *best = {choice, trial};
      }
    }
  }

  AutoBuilder builder_;
  MemoryMenu menu_;
  std::vector<RegionId> regions_;
  size_t sections_ = 0;
  size_t tried_ = 0;
};

// Plans with `auto` and by exhaustive search; false if nothing fits.
bool compare(const StepProgram& plain, Bytes budget, double* worst, size_t* tried) {
  const UnitCost costs = unit_costs();
  PipelineOptions options = planned_for(costs, budget);
  options.environment.early_updates = true;
  Exhaustive exhaustive(plain, options.environment);
  const Found best = exhaustive.best();
  *tried += exhaustive.tried();
  StepProgram planned = plain;
  const std::string error =
      error_of([&] { run_pipeline(planned, PassRegistry::with_builtins(), {"auto"}, options); });
  if (!best.trial.fits) return false;
  EXPECT_EQ(error, "no error") << describe(best.choice);
  if (error != "no error") return true;
  const SimResult result = simulate(planned, costs);
  EXPECT_LE(result.peak, budget);
  EXPECT_LE(memory_timeline(planned).peak, budget);
  const double ratio =
      static_cast<double>(result.time.value) / static_cast<double>(best.trial.time.value);
  EXPECT_LE(ratio, 1.01) << describe(best.choice) << "\n" << planned.reasons[1].text;
  *worst = std::max(*worst, ratio);
  return true;
}

// With two layers at several budgets; with three, at what single toggles once missed.
TEST(AutoPlan, IsWithinAPercentOfExhaustiveSearch) {
  struct Case {
    uint32_t seed;
    int layers;
    int64_t percent;  // of the classical plan's peak
  };
  std::vector<Case> cases = {{3003, 3, 85}, {3017, 3, 92}, {2001, 3, 85}, {3109, 3, 92}};
  if (kSanitized) cases.clear();
  for (uint32_t seed = 0; seed < seeds(12); ++seed) {
    for (const int64_t percent : {70, 90, 130}) cases.push_back({seed, 2, percent});
  }
  double worst = 0;
  size_t tried = 0, compared = 0;
  for (const auto& [seed, layers, percent] : cases) {
    SCOPED_TRACE(std::to_string(seed) + " at " + std::to_string(percent) + "%");
    const StepProgram plain = chain(seed, layers);
    StepProgram classical = plain;
    run_pipeline(classical, PassRegistry::with_builtins(), {"zero3_compile"});
    const Bytes peak = simulate(classical, unit_costs()).peak;
    compared += compare(plain, {peak.value * percent / 100}, &worst, &tried);
  }
  std::cout << compared << " searches, " << tried << " plans, at worst " << worst
            << " of the best time\n";
  EXPECT_GE(compared, cases.size() / 2);
}

Bytes classical_peak(const StepProgram& plain, const Estimator& costs) {
  StepProgram classical = plain;
  run_pipeline(classical, PassRegistry::with_builtins(), {classical_pass(plain)});
  return simulate(classical, costs).peak;
}

// All kinds of placements, graphs, accumulation and clipping.
TEST(AutoPlan, RandomPlansFitAndAreNeverSlower) {
  uint32_t faster = 0, planned = 0;
  for (uint32_t seed = 0; seed < seeds(60); ++seed) {
    StepProgram plain = random_program(seed, {.replicated = seed % 5 == 4});
    for (Param& param : plain.params) {
      if (seed % 5 == 3) param.placement = Placement::kWhole;  // stages 1 and 2
    }
    plain.boundary = seed % 5 == 3 && seed % 2 == 0;
    const UnitCost costs = unit_costs();
    StepProgram classical = plain;
    run_pipeline(classical, PassRegistry::with_builtins(), {classical_pass(plain)});
    const SimResult before = simulate(classical, costs);
    for (const int64_t percent : {85, 100, 150}) {
      const Bytes budget{before.peak.value * percent / 100};
      PipelineOptions options = planned_for(costs, budget);
      options.environment.early_updates = seed % 2 == 0;
      const AutoPlan pass({.simulations = 200});
      StepProgram plan = plain;
      const std::string error = error_of([&] { run_pipeline(plan, {&pass}, options); });
      if (percent < 100 && error != "no error") {
        ASSERT_TRUE(error.starts_with("[passes] auto: no plan fits the memory budget")) << error;
        continue;
      }
      ASSERT_EQ(error, "no error") << seed;
      ++planned;
      ASSERT_EQ(error_of([&] { verify(plan); }), "no error") << seed;
      const SimResult after = simulate(plan, costs);
      ASSERT_LE(after.peak, budget) << seed;
      ASSERT_LE(memory_timeline(plan).peak, budget) << seed;
      if (percent >= 100) {
        ASSERT_LE(after.time, before.time) << seed;
      }
      faster += after.time < before.time;
      StepProgram again = plain;  // a function of its arguments
      run_pipeline(again, {&pass}, options);
      ASSERT_EQ(print(again), print(plan)) << seed;
    }
  }
  EXPECT_GT(planned, 2 * seeds(60));
  EXPECT_GT(faster, seeds(60));
}

// Where the plain plan just fits, what it moves may leave room that is worth more; a budget that it
// does not fit must not give a shorter step.
TEST(AutoPlan, MoreMemoryIsNoLongerStepWhereThePlainPlanBeginsToFit) {
  StepProgram plain = parse_program(layered_program(
      {.layers = kSanitized ? 4 : 5, .unit = 70, .numel = 1400, .header = "accumulation=2"}));
  for (Region& region : plain.regions) region.time = *region.time * 452;
  UnitCost costs;
  costs.slowdown = 3;
  costs.update = Nanos{500};
  const Bytes peak = classical_peak(plain, costs);
  Nanos before{INT64_MAX};
  for (const int64_t percent : {90, 95, 100, 105, 115, 130}) {
    StepProgram plan = plain;
    run_pipeline(plan, PassRegistry::with_builtins(), {"auto"},
                 planned_for(costs, Bytes{peak.value * percent / 100}));
    const Nanos time = simulate(plan, costs).time;
    EXPECT_LE(time, before) << percent << "%";
    before = time;
  }
}

// Steps too large for single toggles, under budgets from loose to tight.
TEST(AutoPlan, LeaveToUpdateEarlyNeverCosts) {
  std::vector<int64_t> numels = {64, 1024, 4096};
  std::vector<int64_t> percents = {70, 80, 90, 100, 130, 200};
  if (kSanitized) {
    numels = {1024};
    percents = {80, 130};
  }
  size_t early = 0;
  for (const int64_t numel : numels) {
    const StepProgram plain = parse_program(layered_program({.layers = 8, .numel = numel}));
    const UnitCost costs = unit_costs();
    const Bytes peak = classical_peak(plain, costs);
    for (const int64_t percent : percents) {
      const auto planned = [&](bool may) {
        PipelineOptions options = planned_for(costs, Bytes{peak.value * percent / 100});
        options.environment.early_updates = may;
        StepProgram plan = plain;
        run_pipeline(plan, PassRegistry::with_builtins(), {"auto"}, options);
        return plan;
      };
      const StepProgram with = planned(true);
      EXPECT_LE(simulate(with, costs).time, simulate(planned(false), costs).time)
          << numel << " " << percent;
      const auto& backward = with.sections[1].instrs;
      early += std::any_of(backward.begin(), backward.end(),
                           [](const Instr& each) { return each.op == Op::kUpdate; });
    }
  }
  EXPECT_GE(3 * early, numels.size() * percents.size());
}

TEST(AutoPlan, SaysWhatIsMissing) {
  const UnitCost costs = unit_costs();
  const auto error = [&](const PipelineOptions& options) {
    StepProgram program = chain(1, 2);
    return error_of(
        [&] { run_pipeline(program, PassRegistry::with_builtins(), {"auto"}, options); });
  };
  EXPECT_EQ(error({}),
            "[passes] auto: plans by simulated time, and has no machine to simulate. Give it one.");
  const std::string tight = error(planned_for(costs, Bytes{100}));
  EXPECT_TRUE(
      tight.starts_with("[passes] auto: no plan fits the memory budget of 100 B: the plain "
                        "plan needs "))
      << tight;
  EXPECT_NE(tight.find("the smallest peak found is "), std::string::npos) << tight;
  EXPECT_NE(tight.find("Raise memory_budget, shard over more ranks"), std::string::npos) << tight;
}

TEST(AutoPlan, NeedsNoBudget) {
  const UnitCost costs = unit_costs();
  StepProgram program = chain(3, 2);
  run_pipeline(program, PassRegistry::with_builtins(), {"auto"}, planned_for(costs));
  EXPECT_EQ(error_of([&] { verify_plan(program); }), "no error");
}

// With memory to spare, copies and second runs gain nothing.
TEST(AutoPlan, MovesNothingForNothing) {
  const UnitCost costs = unit_costs();
  for (uint32_t seed = 0; seed < seeds(20); ++seed) {
    StepProgram program = chain(seed, 3);
    const Bytes budget = classical_peak(program, costs) * 10;
    run_pipeline(program, PassRegistry::with_builtins(), {"auto"}, planned_for(costs, budget));
    const std::string chosen = reasons_for(program, "auto", "")[1];
    EXPECT_NE(chosen.find("0 regions recomputed, 0 activations and the states of 0 parameters"),
              std::string::npos)
        << seed << ": " << chosen;
  }
}

// Where little is missing, the last layer's states stay, which are 16 times the others': their
// copies find neither the room nor the time, though they would come first by their place.
TEST(AutoPlan, MovesTheUnusuallyLargeLast) {
  const std::string equal = layered_program({.layers = 6, .numel = 4096});
  StepProgram program =
      parse_program(replaced(replaced(equal, "param v.5 f32 4096", "param v.5 f32 65536"),
                             "value g.v.5 16384B", "value g.v.5 262144B"));
  const UnitCost costs = unit_costs();
  const Bytes budget = classical_peak(program, costs) - Bytes{20'000};
  run_pipeline(program, PassRegistry::with_builtins(), {"auto"}, planned_for(costs, budget));
  EXPECT_EQ(error_of([&] { verify_plan(program); }), "no error");
  EXPECT_LE(simulate_summary(program, costs).peak, budget);
  int moved = 0;
  for (const Section& section : program.sections) {
    for (const Instr& instr : section.instrs) {
      if (instr.op != Op::kAwaitStates) continue;
      EXPECT_NE(program.param(*instr.param).name, "v.5");
      ++moved;
    }
  }
  EXPECT_GT(moved, 0) << reasons_for(program, "auto", "")[1];
}

TEST(AutoPlan, SaysWhatItChose) {
  const UnitCost costs = unit_costs();
  StepProgram program = chain(3, 2);
  const Bytes budget = classical_peak(program, costs);
  run_pipeline(program, PassRegistry::with_builtins(), {"auto"}, planned_for(costs, budget));
  const auto reasons = reasons_for(program, "auto", "");
  ASSERT_EQ(reasons.size(), 3u);
  EXPECT_TRUE(reasons[0].starts_with("step ")) << reasons[0];
  EXPECT_NE(reasons[0].find(" plans simulated"), std::string::npos) << reasons[0];
  EXPECT_TRUE(reasons[1].starts_with("chosen: zero3_compile, ")) << reasons[1];
  EXPECT_TRUE(reasons[2].starts_with("levels: ")) << reasons[2];
}

// What is read off a plan makes the same plan again.
TEST(AutoPlan, ChoicesCanBeReadOffThePlan) {
  const UnitCost costs = unit_costs();
  for (uint32_t seed = 0; seed < seeds(20); ++seed) {
    const StepProgram plain = chain(seed, 3);
    const Bytes budget{classical_peak(plain, costs).value * 11 / 10};
    const PipelineOptions options = planned_for(costs, budget);
    StepProgram plan = plain;
    run_pipeline(plan, PassRegistry::with_builtins(), {"auto"}, options);
    AutoBuilder builder(plain, options.environment);
    StepProgram again = plain;
    builder.apply(read_choice(builder, plan), again);
    ASSERT_EQ(sections_text(again), sections_text(plan)) << seed;
  }
}

TEST(AutoChoice, LevelsRoundTrip) {
  AutoChoice choice;
  choice.spare = Bytes{1 << 20};
  choice.ahead = 4;
  choice.order_simulations = 16;
  choice.limits = {Bytes{-1}, Bytes{1536}};
  AutoChoice read;
  read_levels(print_levels(choice), &read);
  EXPECT_EQ(read, choice);
  for (const char* other : {"kept: 3", "levels: spare=1MiB ahead=x", "levels: ahead=99999999999",
                            "levels: ahead=-1", "levels: limits=1MiB,many"}) {
    read_levels(other, &read);
    EXPECT_EQ(read, choice) << other;
  }
}

}  // namespace
}  // namespace deepcompile::passes_auto_plan_test
