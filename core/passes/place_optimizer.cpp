// SPDX-License-Identifier: Apache-2.0
#include "passes/place_optimizer.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "ir/text.h"
#include "passes/optimizer_placement.h"
#include "passes/prefetch.h"

namespace deepcompile {
namespace {

// How many runs ahead of the use the updates of next_forward are tried.
constexpr int kAheads[] = {1, 4, 16};
constexpr int kDefaultAhead = 1;
constexpr int kPrefetchSimulations = 4;  // of each place that is tried

struct Candidate {
  Place place = Place::kStep;
  int ahead = 0;
  OptimizerPlacement placement;
  SimSummary alone, prefetched;
};

OptimizerPlacement place(const StepProgram& program, Place place, int ahead) {
  if (place == Place::kNextForward) return place_in_next_forward(program, ahead);
  if (place == Place::kBackward) return place_in_backward(program);
  OptimizerPlacement same;
  for (const Section& section : program.sections) same.instrs.push_back(section.instrs);
  return same;
}

bool has_section(const StepProgram& program, SectionKind kind) {
  return std::any_of(program.sections.begin(), program.sections.end(),
                     [&](const Section& section) { return section.kind == kind; });
}

// Why the updates cannot be in the backward; empty if they can.
std::string backward_refused(const StepProgram& program, const PassEnvironment& environment) {
  if (program.clip) return "the step clips, and the norm comes after the backward";
  if (!environment.early_updates) {
    return "the step may still be skipped or read gradients after the backward (early_updates is "
           "off)";
  }
  return "";
}

// Time and peak of a candidate, by itself and as prefetch leaves it. Nothing
// if it is above the budget.
bool measure(const StepProgram& program, const PassEnvironment& environment, Candidate* candidate) {
  StepProgram trial = program;
  replace_instrs(candidate->placement.instrs, &trial);
  const auto fits = [&](Bytes peak) {
    return !environment.memory_budget || peak <= *environment.memory_budget;
  };
  candidate->alone = candidate->prefetched = environment.simulate(trial);
  if (!fits(candidate->alone.peak)) return false;
  PassContext context(trial, "prefetch", environment);
  Prefetch({.simulations = kPrefetchSimulations}).run(trial, context);
  const SimSummary after = environment.simulate(trial);
  if (fits(after.peak)) candidate->prefetched = after;
  return true;
}

std::string label(const Candidate& candidate) {
  std::string text(to_string(candidate.place));
  if (candidate.place != Place::kNextForward) return text;
  return text + " " + std::to_string(candidate.ahead) + (candidate.ahead == 1 ? " run" : " runs") +
         " ahead";
}

struct Choice {
  Candidate best;
  std::string tried;  // "step 3.20 ms, next_forward 1 run ahead 2.80 ms"
};

Choice fastest(const StepProgram& program, const PassEnvironment& environment) {
  timeline_within(program, environment.memory_budget, "place_optimizer");
  std::vector<std::pair<Place, int>> ways = {{Place::kStep, 0}};
  for (int ahead : kAheads) ways.emplace_back(Place::kNextForward, ahead);
  if (backward_refused(program, environment).empty()) ways.emplace_back(Place::kBackward, 0);
  std::optional<Choice> choice;
  std::string tried;
  for (const auto& [where, ahead] : ways) {
    Candidate candidate{where, ahead, place(program, where, ahead), {}, {}};
    tried += (tried.empty() ? "" : ", ") + label(candidate);
    if (!measure(program, environment, &candidate)) {
      tried += " over the budget";
      continue;
    }
    tried += " " + pretty(candidate.prefetched.time);
    if (choice && candidate.prefetched.time >= choice->best.prefetched.time) continue;
    choice = Choice{std::move(candidate), {}};
  }
  if (!choice) {
    throw UserError("[passes] place_optimizer: the simulated step is above the memory budget of " +
                    pretty(*environment.memory_budget) + " wherever the updates are: " + tried +
                    ". Raise the budget, or put a pass that saves memory before this one.");
  }
  choice->tried = std::move(tried);
  return std::move(*choice);
}

std::string update_cost(const StepProgram& program, ParamId id,
                        const PassEnvironment& environment) {
  if (environment.estimator == nullptr) return "";
  const Instr update{Op::kUpdate, id, std::nullopt, {}};
  return ", " + pretty(environment.estimator->duration(program, update));
}

void explain(const StepProgram& program, const Candidate& choice, PassContext& context) {
  for (const PlacedUpdate& each : choice.placement.updates) {
    if (!each.kept.empty()) {
      context.because(each.param, "updated in the update section: " + each.kept);
      continue;
    }
    const std::string where = section_name(program.sections[each.section]);
    const std::string cost = update_cost(program, each.param, context.environment());
    if (choice.place == Place::kBackward) {
      context.because(each.param,
                      "updated in " + where + ", once its gradient is accumulated" + cost);
    } else {
      context.because(each.param, "updated in the next " + where + ", " +
                                      std::to_string(each.runs_ahead) +
                                      (each.runs_ahead == 1 ? " run" : " runs") +
                                      " ahead of its first use" + cost);
    }
  }
}

void check_possible(const StepProgram& program, Place place, const PassEnvironment& environment) {
  if (place != Place::kBackward) return;
  const std::string why = backward_refused(program, environment);
  if (why.empty()) return;
  throw UserError("[passes] place_optimizer: cannot update in the backward: " + why +
                  ". Choose step or next_forward.");
}

}  // namespace

std::string_view to_string(Place place) {
  switch (place) {
    case Place::kStep:
      return "step";
    case Place::kNextForward:
      return "next_forward";
    case Place::kBackward:
      return "backward";
  }
  DC_CHECK(false, "unknown place");
}

Contract PlaceOptimizer::contract() const {
  return {.needs = {Fact::kUpdatesPlaced}};
}

void PlaceOptimizer::run(StepProgram& program, PassContext& context) const {
  const PassEnvironment& environment = context.environment();
  Candidate choice;
  std::string step;
  if (!has_section(program, SectionKind::kUpdate) || !has_section(program, SectionKind::kForward)) {
    return context.because("unchanged: only a whole step, with forward and update, has a choice");
  }
  if (options_.place) {
    check_possible(program, *options_.place, environment);
    choice = {*options_.place, options_.ahead.value_or(kDefaultAhead), {}, {}, {}};
    choice.placement = place(program, choice.place, choice.ahead);
    step = "as asked for";
  } else if (environment.simulator != nullptr) {
    Choice found = fastest(program, environment);
    choice = std::move(found.best);
    step = "simulated with prefetch: " + found.tried;
  } else {
    return context.because(
        "unchanged: without a machine to simulate, the places cannot be compared");
  }
  if (environment.reasons) explain(program, choice, context);
  context.because("updates: " + label(choice) + "; " + step);
  replace_instrs(std::move(choice.placement.instrs), &program);
}

}  // namespace deepcompile
