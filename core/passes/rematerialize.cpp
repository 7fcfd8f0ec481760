// SPDX-License-Identifier: Apache-2.0
#include "passes/rematerialize.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/error.h"
#include "ir/text.h"
#include "passes/recomputation_choice.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

// Programs built and measured while choosing.
constexpr int kMostRegionRounds = 6;

struct RegionsResult {
  StepProgram program;
  std::vector<Recomputation> plans;  // by graph
  Bytes peak;
};

RegionsResult build(const StepProgram& program, const std::vector<RecomputableGraph>& graphs,
                    const ChosenRuns& chosen, bool share) {
  RegionsResult out{program, {}, {}};
  for (size_t g = 0; g < graphs.size(); ++g) {
    out.plans.push_back(plan_recomputation(program, graphs[g], chosen[g]));
    place_recomputation(graphs[g], out.plans[g], share, &out.program);
  }
  out.peak = memory_peak(out.program);
  return out;
}

// Parameters gathered once for the chain and the backward, unless that is what
// takes the step over the budget.
RegionsResult build_best(const StepProgram& program, const std::vector<RecomputableGraph>& graphs,
                         const ChosenRuns& chosen, const PassEnvironment& environment) {
  RegionsResult shared = build(program, graphs, chosen, true);
  if (!environment.memory_budget || shared.peak <= *environment.memory_budget) return shared;
  RegionsResult apart = build(program, graphs, chosen, false);
  return apart.peak < shared.peak ? std::move(apart) : std::move(shared);
}

ChosenRuns chosen_by_name(const StepProgram& program, const std::vector<RecomputableGraph>& graphs,
                          const std::vector<RegionId>& regions) {
  ChosenRuns out;
  for (const RecomputableGraph& graph : graphs) out.emplace_back(graph.runs.size(), false);
  for (RegionId id : regions) {
    if (index(id) >= program.regions.size()) {
      throw UserError("[passes] rematerialize: region " + std::to_string(index(id)) + " of " +
                      std::to_string(program.regions.size()) +
                      " is to be recomputed. Name regions of this program.");
    }
    bool found = false;
    for (size_t g = 0; g < graphs.size(); ++g) {
      const auto at = std::find(graphs[g].runs.begin(), graphs[g].runs.end(), id);
      if (at == graphs[g].runs.end()) continue;
      const auto run = static_cast<size_t>(at - graphs[g].runs.begin());
      found = true;
      if (graphs[g].allowed[run]) {
        out[g][run] = true;
        continue;
      }
      throw UserError("[passes] rematerialize: region " + program.region(id).name +
                      " cannot run again: it draws random numbers, writes to what it reads, reads "
                      "what another region may write to, or runs twice already. Leave it out.");
    }
    if (found) continue;
    throw UserError("[passes] rematerialize: region " + program.region(id).name +
                    " is in no forward that has a backward. Leave it out.");
  }
  return out;
}

// Chooses against estimates, measures, and aims lower by what was missing.
RegionsResult choose(const StepProgram& program, const std::vector<RecomputableGraph>& graphs,
                     Bytes peak, const PassEnvironment& environment) {
  const Bytes budget = *environment.memory_budget;
  const StepClock clock(program, environment.estimator);
  RecomputationChoice choice(program, graphs, memory_timeline(program), clock,
                             environment.estimator);
  RegionsResult best{program, {}, peak};
  Bytes limit = budget;
  ChosenRuns last;
  for (int round = 0; round < kMostRegionRounds; ++round) {
    const bool reached = choice.reach(limit);
    if (choice.chosen() == last) break;
    last = choice.chosen();
    RegionsResult result = build_best(program, graphs, last, environment);
    const Bytes missing = result.peak - budget;
    if (result.peak < best.peak) best = std::move(result);
    if (!reached || missing <= Bytes{0}) break;
    limit -= missing;
  }
  return best;
}

struct Sum {
  size_t regions = 0;
  Nanos time;
};

// A reason for each region that runs again.
Sum explain_regions(const StepProgram& program, const std::vector<RecomputableGraph>& graphs,
                    const std::vector<Recomputation>& plans, const Estimator* estimator,
                    PassContext& context) {
  Sum sum;
  for (size_t g = 0; g < plans.size(); ++g) {
    for (size_t run = 0; run < plans[g].again.size(); ++run) {
      if (!plans[g].again[run]) continue;
      const RegionId id = graphs[g].runs[run];
      Bytes bytes;
      for (ValueId value : program.region(id).outputs) {
        const bool saved = graphs[g].values[index(value)].first_backward != kNever;
        if (saved && !is_pinned(graphs[g], plans[g].again, value)) {
          bytes += program.value(value).bytes;
        }
      }
      const Nanos time = time_of(program, estimator, {Op::kRun, std::nullopt, id, {}});
      const Section& backward = program.sections[graphs[g].backward];
      context.because(id, "run again in " + section_name(backward) + ", before `" +
                              print(program, backward.instrs[plans[g].place[run]]) + "`: " +
                              (bytes > Bytes{0} ? pretty(bytes) + " less saved for "
                                                : "makes inputs of others again, for ") +
                              pretty(time) + " of compute" +
                              (program.region(id).checkpoint ? " (marked by the user)" : ""));
      ++sum.regions;
      sum.time += time;
    }
  }
  return sum;
}

}  // namespace

void Rematerialize::run(StepProgram& program, PassContext& context) const {
  const PassEnvironment& environment = context.environment();
  const auto budget = environment.memory_budget;
  const std::optional<Bytes> before =
      options_.recompute ? memory_peak(program)
                         : peak_above_budget(program, context, "nothing is recomputed");
  if (!before) return;
  const Bytes peak = *before;
  const std::vector<RecomputableGraph> graphs = recomputable_graphs(program);
  const RegionsResult result =
      options_.recompute
          ? build_best(program, graphs, chosen_by_name(program, graphs, *options_.recompute),
                       environment)
          : choose(program, graphs, peak, environment);
  const Sum sum = explain_regions(program, graphs, result.plans, environment.estimator, context);
  replace_instrs(instrs_of(result.program), &program);
  std::string text = std::to_string(sum.regions) + " regions run again, " + pretty(sum.time) +
                     " of compute a micro batch; peak " + pretty(peak) + " -> " +
                     pretty(result.peak);
  if (budget) {
    text += " of " + pretty(*budget);
    if (result.peak > *budget) text += ", and nothing more that is recomputed lowers it";
  }
  context.because(std::move(text));
}

}  // namespace deepcompile
