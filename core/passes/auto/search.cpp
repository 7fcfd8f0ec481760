// SPDX-License-Identifier: Apache-2.0
#include "passes/auto/search.h"

#include <algorithm>
#include <utility>

namespace deepcompile {
namespace {

// A search may cost about this many instructions simulated.
constexpr size_t kWork = 200'000;
constexpr size_t kFewest = 22, kMost = 6000;
// Recipes that are tried where simulations are not plenty, unless none fits.
constexpr size_t kRecipes = 3;
constexpr int kTries = 3;
// Of the budget, left for gathers ahead and for what only a simulation has in flight: much,
// and little, which gives copies more time.
constexpr double kRoom = 0.03, kTight = 0.005;
// Parts of the budget that copies leave free as they come in, once the smallest peak fits.
constexpr double kEarlier[] = {0.1, kRoom, kTight, 0};
// Simulations for that, and for what is done with it then.
constexpr int kSmallest = 16;
// A correction of how much must go is at least this part of what the peak is to be.
constexpr double kLeast = 0.002;
// Corrections of how much must go until the peak fits.
constexpr int kFitSteps = 5;
// Bytes gathered ahead of use.
constexpr Bytes kAhead{int64_t{4} << 30};
constexpr int kRunsAhead[] = {4, 1, 16};
// Parts of the budget: left free by keeping, for gathers ahead; freed by the
// memory choices beyond what the step needs, for keeping.
constexpr double kReserve[] = {0.03, 0, 0.1};
constexpr double kMore[] = {0.25, 0.1, 0.03};
// What regions are given that run again is moved for more of a step than one in so many: it takes
// the link where gathers and reductions would be put in order later.
constexpr int64_t kHelps = 100;
// Memory is short while less is free than so many times what is to be left free.
constexpr int64_t kAmple = 2;

}  // namespace

int simulations_for(const StepProgram& classical) {
  size_t instrs = 1;
  for (const Section& section : classical.sections) {
    const bool repeats = section.kind != SectionKind::kUpdate;
    instrs += section.instrs.size() * (repeats ? static_cast<size_t>(classical.accumulation) : 1);
  }
  return static_cast<int>(std::clamp(kWork / instrs, kFewest, kMost));
}

// Levels come to the same choice again and again. One that is asked for again counts as a
// simulation, though it is none.
Trial LevelTry::measure(const AutoChoice& choice) {
  ++used_;
  for (const std::vector<Found>* known : {&from_.measured, &std::as_const(measured_)}) {
    const auto found = std::find_if(known->begin(), known->end(),
                                    [&](const Found& each) { return each.choice == choice; });
    if (found != known->end()) return found->trial;
  }
  measured_.push_back({choice, builder_.measure(choice)});
  return measured_.back().trial;
}

bool LevelTry::take(AutoChoice choice, const Trial& trial) {
  if (!better(trial, best_.trial)) return false;
  best_ = {std::move(choice), trial};
  found_ = true;
  return true;
}

bool LevelTry::attempt(const AutoChoice& choice) {
  return left() > 0 && take(choice, measure(choice));
}

// A reserve above what is free keeps nothing; without one, keeping may leave no
// room for what only a simulation sees in flight. Tries once more with room.
bool LevelTry::attempt_keeping(AutoChoice choice) {
  if (left() <= 0) return false;
  Trial trial = measure(choice);
  const Bytes over = trial.peak - builder_.budget();
  if (!trial.fits && over < part_of(builder_.budget(), 0.2) && left() > 0) {
    choice.reserve += over + part_of(builder_.budget(), 0.002);
    trial = measure(choice);
  }
  return take(std::move(choice), trial);
}

// The smallest choice of the recipe whose peak is `target` or less, by a few corrections; if none
// is, the one with the smallest peak. That need not be the largest: what runs again needs room too.
AutoChoice LevelTry::fit(const Recipe& recipe, Bytes target, const AutoChoice& like) {
  const Bytes wanted = from_.plain_peak - target;
  const auto known = from_.bias.find(recipe);
  Bytes& bias =
      bias_.try_emplace(recipe, known == from_.bias.end() ? Bytes{} : known->second).first->second;
  Bytes need = wanted + bias;
  Bytes spare = std::max(Bytes{}, builder_.budget() - target);
  AutoChoice best;
  Bytes least{INT64_MAX};  // peak of `best`
  bool found = false;
  for (int i = 0; i < kFitSteps && need > Bytes{0} && (i == 0 || left() > 0); ++i) {
    bool all = false;
    AutoChoice choice = recipes_.fill(recipe, need, &all);
    choice.place = like.place;
    choice.ahead = like.ahead;
    choice.spare = spare;
    ++used_;
    const Bytes peak = builder_.peak_of_memory_choices(choice);
    const Bytes over = peak - target;
    if (!found && peak < least) least = peak, best = choice;
    if (over <= Bytes{0}) {
      best = std::move(choice);
      found = true;
      bias = need - wanted;
      if (-over.value < target.value / 100) break;  // within 1%
      need += part_of(over, 0.9);
    } else {
      if (found) break;
      // A little is what copies take that come in early: leave them less room.
      const bool little = over.value < target.value / 50;
      if (all && !little) break;
      if (little) spare += over + over;
      need += std::max(over, part_of(target, kLeast));
    }
  }
  return best;
}

// A choice of the recipe that fits in simulation too, if a few tries find one.
void LevelTry::try_recipe(const Recipe& recipe, double room) {
  const AutoChoice& from = from_.best.choice;
  Bytes target = builder_.budget() - part_of(builder_.budget(), room);
  for (int tries = 0; tries < kTries && left() > 0; ++tries) {
    AutoChoice choice = fit(recipe, target, from);
    choice.keep = from.keep;
    choice.reserve = from.reserve;
    choice.prefetch = from.prefetch;
    const Trial trial = measure(choice);
    if (take(std::move(choice), trial)) recipe_ = recipe;
    const Bytes over = trial.peak - builder_.budget();
    if (trial.fits || over > part_of(builder_.budget(), 0.5)) return;
    target = target - over - part_of(over, 0.3) - part_of(builder_.budget(), 0.002);
  }
}

// What it moves must pay: not every copy's cost is simulated.
void LevelTry::try_more(const Recipe& recipe, Bytes most, const AutoChoice& like) {
  const AutoChoice& from = from_.best.choice;
  AutoChoice choice = fit(recipe, most, like);
  choice.keep = std::nullopt;
  choice.reserve = from.reserve;
  choice.prefetch = from.prefetch;
  if (!attempt_keeping(std::move(choice))) return;
  recipe_ = recipe;
  found_ = best_.trial.time < from_.best.trial.time;
}

void LevelTry::try_all_again(std::optional<AutoChoice>* all_again) {
  const AutoChoice& from = from_.best.choice;
  const Recipe recipe{{RecipeKind::kRecompute, false}};
  AutoChoice choice = recipes_.fill(recipe, Bytes{INT64_MAX / 2});
  choice.place = from.place;
  choice.ahead = from.ahead;
  choice.keep = std::nullopt;
  choice.reserve = part_of(builder_.budget(), kReserve[0]);
  choice.prefetch = from.prefetch;
  if (choice.recompute.empty()) return;
  ++used_;
  if (builder_.peak_of_memory_choices(choice) > builder_.budget()) return;
  *all_again = choice;
  if (attempt_keeping(std::move(choice))) recipe_ = recipe;
}

void LevelTry::only_if_it_helps(int64_t times) {
  const Trial& before = from_.best.trial;
  if (!before.fits) return;
  found_ = found_ && (before.time - best_.trial.time).value * times >= before.time.value;
}

void LevelTry::put_into(LevelState* state) const {
  state->left -= used_;
  state->measured.insert(state->measured.end(), measured_.begin(), measured_.end());
  for (const auto& [recipe, bias] : bias_) state->bias[recipe] = bias;
  if (!found_ || !better(best_.trial, state->best.trial)) return;
  state->best = best_;
  if (!recipe_.empty()) state->recipe = recipe_;
}

template <typename Ask>
void LevelSearch::each(size_t count, const Ask& ask) {
  if (state_.left <= 0) return;
  const std::vector<LevelTry> tried = builders_.each(count, [&](AutoBuilder& builder, size_t i) {
    LevelTry out(builder, recipes_, state_);
    ask(out, i);
    return out;
  });
  for (const LevelTry& one : tried) one.put_into(&state_);
}

void LevelSearch::each_keeping(const std::vector<AutoChoice>& choices) {
  each(choices.size(), [&](LevelTry& one, size_t i) { one.attempt_keeping(choices[i]); });
}

void LevelSearch::attempt(const AutoChoice& choice) {
  each(1, [&](LevelTry& one, size_t) { one.attempt(choice); });
}

// By what they are expected to cost; others only until one fits. Where the optimizer runs decides
// how well copies hide, and it seldom runs best by itself.
void LevelSearch::try_recipes() {
  state_.best.choice.place = spread();
  state_.best.choice.ahead = kRunsAhead[0];
  const std::vector<Recipe> order = recipes_.by_cost(state_.plain_peak - budget());
  const auto try_some = [&](size_t first, size_t last) {
    each(last - first, [&](LevelTry& one, size_t i) { one.try_recipe(order[first + i], kRoom); });
  };
  const size_t count = state_.left > kPlenty ? order.size() : std::min(kRecipes, order.size());
  try_some(0, count);
  if (!best().trial.fits) try_some(count, order.size());
  if (state_.left > kPlenty || !best().trial.fits) {
    const std::vector<Recipe> tight = Recipes::tight();
    each(tight.size(), [&](LevelTry& one, size_t i) {
      one.try_recipe(tight[i], kRoom);
      one.only_if_it_helps(kHelps);
    });
  }
  if (!best().trial.fits) return try_smallest();
  each(1, [&](LevelTry& one, size_t) { one.try_recipe(Recipe(state_.recipe), kTight); });
  AutoChoice together = best().choice;
  together.place = Place::kStep;
  together.ahead = 1;
  attempt(together);
}

// The smallest peak, however long the step: everything that can wait on the host does, and comes in
// no earlier than it is needed. Nothing runs again, which needs room for all that a region makes
// where its activations come in one by one. The budget has no part in it: what is found here is
// found under any other.
void LevelSearch::try_smallest() {
  state_.left = std::max(state_.left, kSmallest);
  AutoChoice all = recipes_.everything_away();
  all.spare = budget();
  const std::vector<Place> places = {Place::kStep, spread()};
  each(places.size(), [&](LevelTry& one, size_t i) {
    AutoChoice choice = all;
    choice.place = places[i];
    one.attempt(choice);
  });
  if (!best().trial.fits) return;
  AutoChoice choice = best().choice;
  choice.prefetch = kAhead;
  attempt(choice);
  // Now copies may come in earlier, as far as there is room.
  each(std::size(kEarlier), [&](LevelTry& one, size_t i) {
    AutoChoice earlier = best().choice;
    earlier.spare = part_of(budget(), kEarlier[i]);
    one.attempt(earlier);
  });
}

void LevelSearch::try_places() {
  std::vector<AutoChoice> choices;
  for (const int ahead : kRunsAhead) {
    AutoChoice choice = best().choice;
    choice.place = spread();
    choice.ahead = ahead;
    if (choice != best().choice) choices.push_back(std::move(choice));
    if (spread() == Place::kBackward) break;  // it has no `ahead`
  }
  each_keeping(choices);
  if (spread() != Place::kBackward || state_.plain_peak <= budget()) return;
  // There states come and go as gradients do: all of them may be away.
  if (best().choice.place != Place::kBackward) return;
  each(1, [&](LevelTry& one, size_t) { one.try_recipe(Recipes::all_states(), kRoom); });
}

// How much is gathered ahead of use, and how much of the budget keeping leaves free for that.
void LevelSearch::try_room() {
  std::vector<AutoChoice> choices;
  const Bytes now = best().choice.prefetch.value_or(kAhead);
  for (const int64_t part : {4, 16}) {
    choices.push_back(best().choice);
    choices.back().prefetch = Bytes{now.value / part};
  }
  for (const double part : kReserve) {
    AutoChoice choice = best().choice;
    choice.keep = std::nullopt;
    choice.reserve = part_of(budget(), part);
    if (choice != best().choice) choices.push_back(std::move(choice));
  }
  each_keeping(choices);
  // And what is left over.
  const Bytes over = part_of(budget() - best().trial.peak, 0.9);
  if (best().choice.keep || best().choice.reserve == Bytes{0} || over <= Bytes{0}) return;
  AutoChoice choice = best().choice;
  choice.reserve = std::max(Bytes{0}, choice.reserve - over);
  attempt(choice);
}

// Whether keeping more whole would want memory that is not there.
bool LevelSearch::is_short() const {
  if (!builder().environment().memory_budget) return false;
  const Bytes free = budget() - best().trial.peak;
  return free < std::max(best().choice.reserve, part_of(budget(), kReserve[0])) * kAmple;
}

// Frees more than the step needs, to keep more whole.
void LevelSearch::try_more_memory() {
  if (!is_short()) return;
  const Recipe hidden{{RecipeKind::kStates, true}, {RecipeKind::kRecompute, false}};
  std::vector<Recipe> recipes = {state_.recipe.empty() ? hidden : state_.recipe};
  if (state_.left > kPlenty / 2) {
    recipes = Recipes::all();
  } else if (best().choice.place == Place::kBackward && recipes.front() != Recipes::all_states()) {
    recipes.push_back(Recipes::all_states());
  }
  const Bytes most = std::min(state_.plain_peak, budget());
  each(std::size(kMore) * recipes.size(), [&](LevelTry& one, size_t i) {
    const double part = kMore[i / recipes.size()];
    one.try_more(recipes[i % recipes.size()], most - part_of(budget(), part), best().choice);
  });
}

void LevelSearch::improve() {
  for (Trial before{}; state_.left > 0 && before != best().trial;) {
    before = best().trial;
    try_room();
    try_more_memory();
  }
}

// Where the plain plan fits, no recipe has been tried. What it moves leaves room, which may be
// worth more, once updates are where they hide best.
void LevelSearch::try_second_start() {
  if (!classical_.trial.fits || !is_short()) return;
  AutoChoice like = best().choice;
  like.place = spread();
  like.ahead = kRunsAhead[0];
  std::vector<double> parts = {kMore[1]};
  std::vector<Recipe> order = recipes_.by_cost(part_of(budget(), kMore[1]));
  if (state_.left > kPlenty) {
    parts.assign(std::begin(kMore), std::end(kMore));
  } else {
    order.resize(1);
  }
  const Bytes most = std::min(state_.plain_peak, budget());
  each(parts.size() * order.size(), [&](LevelTry& one, size_t i) {
    const Bytes target = most - part_of(budget(), parts[i / order.size()]);
    one.try_more(order[i % order.size()], target, like);
  });
}

// The far end: everything runs again, and what that frees keeps parameters
// whole. It may be worth its compute only once the link is ordered.
void LevelSearch::try_recompute_all() {
  if (!is_short()) return;
  each(1, [&](LevelTry& one, size_t) { one.try_all_again(&all_again_); });
}

Found LevelSearch::run() {
  state_.best.trial = {Nanos{INT64_MAX}, Bytes{INT64_MAX}, false};
  attempt({});
  classical_ = best();
  state_.plain_peak = builders_.first().peak_of_memory_choices({});
  AutoChoice ahead = best().choice;  // never worse than useful, and it is what all others build on
  ahead.prefetch = kAhead;
  if (best().trial.fits) {
    attempt(ahead);
  } else {
    state_.best.choice.prefetch = ahead.prefetch;
    try_recipes();
  }
  if (!best().trial.fits) return best();
  AutoChoice keeping = best().choice;
  keeping.keep = std::nullopt;
  each_keeping({keeping});
  try_places();
  try_recompute_all();
  improve();
  const Trial first = best().trial;
  try_second_start();
  if (best().trial != first) improve();
  return best();
}

}  // namespace deepcompile
