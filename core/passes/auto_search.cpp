// SPDX-License-Identifier: Apache-2.0
#include "passes/auto_search.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "base/lists.h"

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
// Corrections of how much must go until the peak fits.
constexpr int kFitSteps = 5;
// Bytes gathered ahead of use.
constexpr Bytes kAhead{int64_t{4} << 30};
constexpr int kRunsAhead[] = {4, 1, 16};
// Parts of the budget: left free by keeping, for gathers ahead; freed by the
// memory choices beyond what the step needs, for keeping.
constexpr double kReserve[] = {0.03, 0, 0.1};
constexpr double kMore[] = {0.1, 0.03, 0.25};
// What regions are given that run again is moved for more of a step than one in so many: it takes
// the link where gathers and reductions would be put in order later.
constexpr int64_t kHelps = 100;
// Memory is short while less is free than so many times what is to be left free.
constexpr int64_t kAmple = 2;

template <typename Id>
void sort_ids(std::vector<Id>* ids) {
  std::sort(ids->begin(), ids->end());
}

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

// Takes from the menu, in its order, until `need` is freed or `room` is used up. One that
// frees much more than is missing waits for a smaller one: moving it costs more, too.
template <typename Id>
void move_from(const std::vector<Movable>& menu, Nanos room, Bytes* need, std::vector<Id>* moved) {
  std::vector<bool> taken(menu.size(), false);
  size_t first = 0;  // not taken
  const auto next = [&] {
    while (first < menu.size() && taken[first]) ++first;
    size_t smallest = menu.size();
    for (size_t i = first; i < menu.size(); ++i) {
      if (taken[i] || menu[i].transfer > room) continue;
      if (menu[i].bytes.value / 3 <= need->value / 2) return i;
      if (smallest == menu.size() || menu[i].bytes < menu[smallest].bytes) smallest = i;
    }
    return smallest;
  };
  while (*need > Bytes{0}) {
    const size_t i = next();
    if (i == menu.size()) return;
    taken[i] = true;
    moved->push_back(Id{menu[i].id});
    room -= menu[i].transfer;
    *need -= menu[i].bytes;
  }
}

// Adds to the choice until `need` is freed, by the menu's estimates; returns
// what is still missing.
Bytes LevelSearch::add(const Part& part, Bytes need, AutoChoice* choice) const {
  Nanos room{part.hidden ? 0 : INT64_MAX};
  switch (part.kind) {
    case Kind::kRecompute:
      for (const RecomputeUnit& unit : menu_.recompute()) {
        if (need <= Bytes{0}) break;
        choice->recompute.insert(choice->recompute.end(), unit.regions.begin(), unit.regions.end());
        need -= unit.saved;
      }
      return need;
    case Kind::kValues:
      if (part.hidden) room = {menu_.forward_compute().value * 2 / 3};
      choice->offload_values.clear();  // what is there is part of the rest's menu too
      move_from(menu_.values(choice->recompute), room, &need, &choice->offload_values);
      return need;
    case Kind::kGiven:
      leave_out_remade(menu_, false, choice);
      move_from(menu_.given(choice->recompute), room, &need, &choice->offload_values);
      return need;
    case Kind::kStates:
      if (part.hidden) room = {menu_.compute().value * 2 / 3};
      choice->offload_states.clear();
      move_from(menu_.states(), room, &need, &choice->offload_states);
      return need;
  }
  return need;
}

void leave_out_remade(const MemoryMenu& menu, bool given, AutoChoice* choice) {
  if (choice->recompute.empty() || choice->offload_values.empty()) return;
  const std::vector<bool> waits = menu.waits(choice->recompute);
  const std::vector<bool> made = menu.made_by(choice->recompute);
  std::erase_if(choice->offload_values,
                [&](ValueId id) { return !waits[index(id)] || (made[index(id)] && !given); });
}

AutoChoice LevelSearch::fill(const Recipe& recipe, Bytes need, bool* all) const {
  AutoChoice choice;
  std::vector<Bytes> missing_before(4, Bytes{});
  bool given = false;
  for (const Part& part : recipe) {
    if (need <= Bytes{0}) break;
    Bytes& before = missing_before[static_cast<size_t>(part.kind)];
    need += before;  // a second, unhidden part of a kind starts over
    given = given || part.kind == Kind::kGiven;
    const Bytes left = add(part, need, &choice);
    before = need - left;
    need = left;
  }
  if (all != nullptr) *all = need > Bytes{0};
  leave_out_remade(menu_, given, &choice);
  sort_ids(&choice.recompute);
  sort_ids(&choice.offload_values);
  sort_ids(&choice.offload_states);
  return choice;
}

// The smallest choice of the recipe whose peak is `target` or less, by a few corrections; if none
// is, the one with the smallest peak. That need not be the largest: what runs again needs room too.
AutoChoice LevelSearch::fit(const Recipe& recipe, Bytes target) {
  const Bytes wanted = plain_peak_ - target;
  Bytes& bias = bias_[recipe];  // of the estimates, as found before
  Bytes need = wanted + bias;
  Bytes spare = std::max(Bytes{}, builder_.budget() - target);
  AutoChoice best;
  Bytes least{INT64_MAX};  // peak of `best`
  bool found = false;
  for (int i = 0; i < kFitSteps && need > Bytes{0} && (i == 0 || left_ > 0); ++i) {
    bool all = false;
    AutoChoice choice = fill(recipe, need, &all);
    choice.place = best_.choice.place;
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
      need += over;
    }
  }
  return best;
}

std::vector<LevelSearch::Recipe> LevelSearch::recipes() const {
  const Part states{Kind::kStates, true}, values{Kind::kValues, true};
  const Part all_states{Kind::kStates, false}, all_values{Kind::kValues, false};
  const Part recompute{Kind::kRecompute, false};
  return {
      {recompute, states, all_values, all_states},
      {states, recompute, all_values, all_states},
      {states, values, recompute, all_values, all_states},
      {values, recompute, all_values, all_states},
      {all_states, recompute, all_values},
      {all_values, all_states, recompute},
  };
}

// For when none of these fits, or simulations are plenty.
std::vector<LevelSearch::Recipe> LevelSearch::tight_recipes() {
  const Part states{Kind::kStates, true}, all_states{Kind::kStates, false};
  const Part recompute{Kind::kRecompute, false}, all_values{Kind::kValues, false};
  const Part given{Kind::kGiven, false};
  return {
      {recompute, all_values, all_states, given},
      {recompute, all_values, states, given, all_states},
  };
}

// Recipes by what they are expected to cost, cheapest first; those that come
// to the same are there once.
std::vector<LevelSearch::Recipe> LevelSearch::by_cost(Bytes need) const {
  std::vector<std::pair<Nanos, Recipe>> order;
  std::vector<AutoChoice> seen;
  for (const Recipe& recipe : recipes()) {
    AutoChoice choice = fill(recipe, need);
    if (std::find(seen.begin(), seen.end(), choice) != seen.end()) continue;
    order.emplace_back(cost_of(choice), recipe);
    seen.push_back(std::move(choice));
  }
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<Recipe> out;
  for (auto& [cost, recipe] : order) out.push_back(std::move(recipe));
  return out;
}

// Compute that is added, and copies that no compute hides.
Nanos LevelSearch::cost_of(const AutoChoice& choice) const {
  const std::vector<bool> again = marked(choice.recompute, builder_.classical().regions.size());
  Nanos cost, values, states;
  for (const RecomputeUnit& unit : menu_.recompute()) {
    if (again[index(unit.regions.front())]) cost += unit.time;
  }
  const auto add_up = [](const std::vector<Movable>& menu, const auto& chosen, Nanos* sum) {
    for (const Movable& each : menu) {
      using Id = typename std::decay_t<decltype(chosen)>::value_type;
      if (std::binary_search(chosen.begin(), chosen.end(), Id{each.id})) *sum += each.transfer;
    }
  };
  add_up(menu_.values(choice.recompute), choice.offload_values, &values);
  add_up(menu_.states(), choice.offload_states, &states);
  cost += std::max(Nanos{}, values + states - menu_.forward_compute());
  cost += std::max(Nanos{}, states - menu_.compute());
  return cost;
}

// A choice of the recipe that fits in simulation too, if a few tries find one.
void LevelSearch::try_recipe(const Recipe& recipe, double room) {
  Bytes target = builder_.budget() - part_of(builder_.budget(), room);
  for (int tries = 0; tries < kTries && left_ > 0; ++tries) {
    AutoChoice choice = fit(recipe, target);
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
void LevelSearch::try_forward() {
  AutoChoice forward = best_.choice;
  forward.place = Place::kNextForward;
  forward.ahead = kRunsAhead[0];
  if (forward != best_.choice) attempt(forward);
}

void LevelSearch::try_recipes() {
  const std::vector<Recipe> order = by_cost(plain_peak_ - builder_.budget());
  const size_t count = left_ > kPlenty ? order.size() : std::min(kRecipes, order.size());
  for (size_t i = 0; i < order.size() && (i < count || !best_.trial.fits); ++i) {
    try_recipe(order[i], kRoom);
    if (i == 0) try_forward();
  }
  for (const Recipe& recipe : tight_recipes()) {
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
    try_forward();
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
  AutoChoice all;
  for (const Movable& each : menu_.values({}, true)) all.offload_values.push_back(ValueId{each.id});
  for (const Movable& each : menu_.states()) all.offload_states.push_back(ParamId{each.id});
  sort_ids(&all.offload_values);
  sort_ids(&all.offload_states);
  all.spare = builder_.budget();
  for (const Place place : {Place::kStep, Place::kNextForward, Place::kBackward}) {
    if (place == Place::kBackward && !builder_.early_updates()) continue;
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
    choice.place = Place::kNextForward;
    choice.ahead = ahead;
    if (choice != best_.choice && !attempt_keeping(choice)) break;
  }
  if (!builder_.early_updates()) return;
  AutoChoice choice = best_.choice;
  choice.place = Place::kBackward;
  attempt_keeping(choice);
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
  const Recipe hidden{{Kind::kStates, true}, {Kind::kRecompute, false}};
  std::vector<Recipe> tried = {recipe_.empty() ? hidden : recipe_};
  if (left_ > kPlenty / 2) tried = recipes();
  const Bytes most = std::min(plain_peak_, builder_.budget());
  for (const Recipe& recipe : tried) {
    for (const double part : kMore) {
      if (left_ <= 0) return;
      AutoChoice choice = fit(recipe, most - part_of(builder_.budget(), part));
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
  AutoChoice choice = fill({{Kind::kRecompute, false}}, Bytes{INT64_MAX / 2});
  choice.place = best_.choice.place;
  choice.ahead = best_.choice.ahead;
  choice.keep = std::nullopt;
  choice.reserve = part_of(builder_.budget(), kReserve[0]);
  choice.prefetch = best_.choice.prefetch;
  if (choice.recompute.empty()) return;
  all_again_ = choice;
  if (attempt_keeping(choice)) recipe_ = {{Kind::kRecompute, false}};
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
