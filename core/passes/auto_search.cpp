// SPDX-License-Identifier: Apache-2.0
#include "passes/auto_search.h"

#include <algorithm>
#include <utility>

namespace deepcompile {
namespace {

// A search may cost about this many instructions simulated.
constexpr size_t kWork = 200'000;
constexpr size_t kFewest = 22, kMost = 6000;
// With more simulations than this, all recipes are tried; else only so many,
// unless none fits.
constexpr int kPlenty = 100;
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

// Levels come to the same choice again and again. One that is asked for again
// counts as a simulation, though it is none.
Trial LevelSearch::measure(const AutoChoice& choice) {
  --left_;
  const auto known = std::find_if(measured_.begin(), measured_.end(),
                                  [&](const Found& each) { return each.choice == choice; });
  if (known != measured_.end()) return known->trial;
  measured_.push_back({choice, builder_.measure(choice)});
  return measured_.back().trial;
}

// Takes the choice if it is better than the best so far.
bool LevelSearch::attempt(const AutoChoice& choice) {
  if (left_ <= 0) return false;
  const Trial trial = measure(choice);
  if (!better(trial, best_.trial)) return false;
  best_ = {choice, trial};
  return true;
}

// A reserve above what is free keeps nothing; without one, keeping may leave no
// room for what only a simulation sees in flight. Tries once more with room.
bool LevelSearch::attempt_keeping(const AutoChoice& choice) {
  if (left_ <= 0) return false;
  Trial trial = measure(choice);
  AutoChoice tried = choice;
  if (!trial.fits && trial.peak - builder_.budget() < part_of(builder_.budget(), 0.2) &&
      left_ > 0) {
    tried.reserve += trial.peak - builder_.budget() + part_of(builder_.budget(), 0.002);
    trial = measure(tried);
  }
  if (!better(trial, best_.trial)) return false;
  best_ = {std::move(tried), trial};
  return true;
}

// The smallest choice of the recipe whose peak is `target` or less, by a few corrections; if none
// is, the one with the smallest peak. That need not be the largest: what runs again needs room too.
AutoChoice LevelSearch::fit(const Recipe& recipe, Bytes target, Place place) {
  const Bytes wanted = plain_peak_ - target;
  Bytes& bias = bias_[recipe];  // of the estimates, as found before
  Bytes need = wanted + bias;
  Bytes spare = std::max(Bytes{}, builder_.budget() - target);
  AutoChoice best;
  Bytes least{INT64_MAX};  // peak of `best`
  bool found = false;
  for (int i = 0; i < kFitSteps && need > Bytes{0} && (i == 0 || left_ > 0); ++i) {
    bool all = false;
    AutoChoice choice = recipes_.fill(recipe, need, &all);
    choice.place = place;
    choice.ahead = best_.choice.ahead;
    choice.spare = spare;
    --left_;
    const Bytes peak = builder_.peak_of_memory_choices(choice);
    const Bytes over = peak - target;
    if (!found && peak < least) least = peak, best = choice;
    if (over <= Bytes{0}) {
      best = std::move(choice);
      found = true;
      bias = need - wanted;
      if (-over.value * 100 < target.value) break;  // within 1%
      need += part_of(over, 0.9);
    } else {
      if (found) break;
      // A little is what copies take that come in early: leave them less room.
      const bool little = over.value * 50 < target.value;
      if (all && !little) break;
      if (little) spare += over + over;
      need += std::max(over, part_of(target, kLeast));
    }
  }
  return best;
}

// A choice of the recipe that fits in simulation too, if a few tries find one.
void LevelSearch::try_recipe(const Recipe& recipe, double room) {
  Bytes target = builder_.budget() - part_of(builder_.budget(), room);
  for (int tries = 0; tries < kTries && left_ > 0; ++tries) {
    AutoChoice choice = fit(recipe, target, best_.choice.place);
    choice.keep = best_.choice.keep;
    choice.reserve = best_.choice.reserve;
    choice.prefetch = best_.choice.prefetch;
    const Trial trial = measure(choice);
    if (better(trial, best_.trial)) {
      best_ = {choice, trial};
      recipe_ = recipe;
    }
    const Bytes over = trial.peak - builder_.budget();
    if (trial.fits || over > part_of(builder_.budget(), 0.5)) return;
    target = target - over - part_of(over, 0.3) - part_of(builder_.budget(), 0.002);
  }
}

// Where the optimizer runs decides how well copies hide: settled early.
void LevelSearch::try_spread() {
  AutoChoice choice = best_.choice;
  choice.place = spread();
  choice.ahead = kRunsAhead[0];
  if (choice != best_.choice) attempt(choice);
}

void LevelSearch::try_recipes() {
  const std::vector<Recipe> order = recipes_.by_cost(plain_peak_ - builder_.budget());
  const size_t count = left_ > kPlenty ? order.size() : std::min(kRecipes, order.size());
  for (size_t i = 0; i < order.size() && (i < count || !best_.trial.fits); ++i) {
    try_recipe(order[i], kRoom);
    if (i == 0) try_spread();
  }
  for (const Recipe& recipe : Recipes::tight()) {
    if (left_ <= kPlenty && best_.trial.fits) break;
    const Found before = best_;
    const Recipe by = recipe_;
    try_recipe(recipe, kRoom);
    if (!before.trial.fits) continue;
    const int64_t less = before.trial.time.value - best_.trial.time.value;
    if (less * kHelps < before.trial.time.value) best_ = before, recipe_ = by;
  }
  if (best_.trial.fits) {
    try_recipe(Recipe(recipe_), kTight);
    try_spread();
    return;
  }
  try_smallest();
}

// The smallest peak, however long the step: everything that can wait on the host does, and comes in
// no earlier than it is needed. Nothing runs again, which needs room for all that a region makes
// where its activations come in one by one. The budget has no part in it: what is found here is
// found under any other.
void LevelSearch::try_smallest() {
  left_ = std::max(left_, kSmallest);
  AutoChoice all = recipes_.everything_away();
  all.spare = builder_.budget();
  for (const Place place : {Place::kStep, spread()}) {
    all.place = place;
    attempt(all);
  }
  if (!best_.trial.fits) return;
  AutoChoice choice = best_.choice;
  choice.prefetch = kAhead;
  attempt(choice);
  // Now copies may come in earlier, as far as there is room.
  for (const double part : kEarlier) {
    choice = best_.choice;
    choice.spare = part_of(builder_.budget(), part);
    attempt(choice);
  }
}

void LevelSearch::try_places() {
  for (const int ahead : kRunsAhead) {
    AutoChoice choice = best_.choice;
    choice.place = spread();
    choice.ahead = ahead;
    if (choice != best_.choice && !attempt_keeping(choice)) break;
    if (spread() == Place::kBackward) break;  // it has no `ahead`
  }
  if (spread() != Place::kBackward || plain_peak_ <= builder_.budget()) return;
  // There states come and go as gradients do: all of them may be away.
  const Recipe recipe = Recipes::all_states();
  AutoChoice choice =
      fit(recipe, builder_.budget() - part_of(builder_.budget(), kRoom), Place::kBackward);
  choice.keep = best_.choice.keep;
  choice.reserve = best_.choice.reserve;
  choice.prefetch = best_.choice.prefetch;
  if (attempt_keeping(choice)) recipe_ = recipe;
}

void LevelSearch::try_ahead() {
  const Bytes now = best_.choice.prefetch.value_or(kAhead);
  for (const int64_t part : {4, 16}) {
    AutoChoice choice = best_.choice;
    choice.prefetch = Bytes{now.value / part};
    if (!attempt_keeping(choice)) break;
  }
}

void LevelSearch::try_reserve() {
  for (const double part : kReserve) {
    AutoChoice choice = best_.choice;
    choice.keep = std::nullopt;
    choice.reserve = part_of(builder_.budget(), part);
    if (choice == best_.choice) continue;
    attempt_keeping(choice);
  }
  // And what is left over.
  const Bytes over = part_of(builder_.budget() - best_.trial.peak, 0.9);
  if (best_.choice.keep || best_.choice.reserve == Bytes{0} || over <= Bytes{0}) return;
  AutoChoice choice = best_.choice;
  choice.reserve = std::max(Bytes{0}, choice.reserve - over);
  attempt(choice);
}

// Whether keeping more whole would want memory that is not there.
bool LevelSearch::is_short() const {
  if (!builder_.environment().memory_budget) return false;
  const Bytes free = builder_.budget() - best_.trial.peak;
  return free < std::max(best_.choice.reserve, part_of(builder_.budget(), kReserve[0])) * kAmple;
}

// Frees more than the step needs, to keep more whole. What it moves for that
// must pay: not every copy's cost is simulated.
void LevelSearch::try_more_memory() {
  if (!is_short()) return;
  const Recipe hidden{{RecipeKind::kStates, true}, {RecipeKind::kRecompute, false}};
  std::vector<Recipe> tried = {recipe_.empty() ? hidden : recipe_};
  if (left_ > kPlenty / 2) {
    tried = Recipes::all();
  } else if (best_.choice.place == Place::kBackward && tried.front() != Recipes::all_states()) {
    tried.push_back(Recipes::all_states());
  }
  const Bytes most = std::min(plain_peak_, builder_.budget());
  for (const double part : kMore) {
    for (const Recipe& recipe : tried) {
      if (left_ <= 0) return;
      AutoChoice choice = fit(recipe, most - part_of(builder_.budget(), part), best_.choice.place);
      choice.keep = std::nullopt;
      choice.reserve = best_.choice.reserve;
      choice.prefetch = best_.choice.prefetch;
      const Found before = best_;
      if (!attempt_keeping(choice)) continue;
      if (best_.trial.time < before.trial.time) {
        recipe_ = recipe;
      } else {
        best_ = before;
      }
    }
  }
}

// The far end: everything runs again, and what that frees keeps parameters
// whole. It may be worth its compute only once the link is ordered.
void LevelSearch::try_recompute_all() {
  if (!is_short()) return;
  AutoChoice choice = recipes_.fill({{RecipeKind::kRecompute, false}}, Bytes{INT64_MAX / 2});
  choice.place = best_.choice.place;
  choice.ahead = best_.choice.ahead;
  choice.keep = std::nullopt;
  choice.reserve = part_of(builder_.budget(), kReserve[0]);
  choice.prefetch = best_.choice.prefetch;
  if (choice.recompute.empty()) return;
  --left_;
  if (builder_.peak_of_memory_choices(choice) > builder_.budget()) return;
  all_again_ = choice;
  if (attempt_keeping(choice)) recipe_ = {{RecipeKind::kRecompute, false}};
}

Found LevelSearch::run() {
  best_.trial = {Nanos{INT64_MAX}, Bytes{INT64_MAX}, false};
  attempt({});
  classical_ = best_;
  plain_peak_ = builder_.peak_of_memory_choices({});
  AutoChoice ahead = best_.choice;  // never worse than useful, and it is what all others build on
  ahead.prefetch = kAhead;
  if (best_.trial.fits) attempt(ahead);
  best_.choice.prefetch = best_.trial.fits ? best_.choice.prefetch : ahead.prefetch;
  if (!best_.trial.fits) try_recipes();
  if (!best_.trial.fits) return best_;
  AutoChoice keeping = best_.choice;
  keeping.keep = std::nullopt;
  attempt_keeping(keeping);
  try_places();
  try_recompute_all();
  for (Trial before{}; left_ > 0 && before != best_.trial;) {
    before = best_.trial;
    try_ahead();
    try_reserve();
    try_more_memory();
  }
  return best_;
}

}  // namespace deepcompile
