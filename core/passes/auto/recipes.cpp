// SPDX-License-Identifier: Apache-2.0
#include "passes/auto/recipes.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "base/lists.h"

namespace deepcompile {
namespace {

template <typename Id>
void sort_ids(std::vector<Id>* ids) {
  std::sort(ids->begin(), ids->end());
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

}  // namespace

void leave_out_remade(const MemoryMenu& menu, bool given, AutoChoice* choice) {
  if (choice->recompute.empty() || choice->offload_values.empty()) return;
  const std::vector<bool> waits = menu.waits(choice->recompute);
  const std::vector<bool> made = menu.made_by(choice->recompute);
  std::erase_if(choice->offload_values,
                [&](ValueId id) { return !waits[index(id)] || (made[index(id)] && !given); });
}

// Adds to the choice until `need` is freed; returns what is still missing.
Bytes Recipes::add(const RecipePart& part, Bytes need, AutoChoice* choice) const {
  Nanos room{part.hidden ? 0 : INT64_MAX};
  switch (part.kind) {
    case RecipeKind::kRecompute:
      for (const RecomputeUnit& unit : menu_.recompute()) {
        if (need <= Bytes{0}) break;
        choice->recompute.insert(choice->recompute.end(), unit.regions.begin(), unit.regions.end());
        need -= unit.saved;
      }
      return need;
    case RecipeKind::kValues:
      if (part.hidden) room = {menu_.forward_compute().value * 2 / 3};
      choice->offload_values.clear();  // what is there is part of the rest's menu too
      move_from(menu_.values(choice->recompute), room, &need, &choice->offload_values);
      return need;
    case RecipeKind::kGiven:
      leave_out_remade(menu_, false, choice);
      move_from(menu_.given(choice->recompute), room, &need, &choice->offload_values);
      return need;
    case RecipeKind::kStates:
      if (part.hidden) room = {menu_.compute().value * 2 / 3};
      choice->offload_states.clear();
      move_from(menu_.states(), room, &need, &choice->offload_states);
      return need;
  }
  return need;
}

AutoChoice Recipes::fill(const Recipe& recipe, Bytes need, bool* everything) const {
  AutoChoice choice;
  std::vector<Bytes> missing_before(4, Bytes{});
  bool given = false;
  for (const RecipePart& part : recipe) {
    if (need <= Bytes{0}) break;
    Bytes& before = missing_before[static_cast<size_t>(part.kind)];
    need += before;  // a second, unhidden part of a kind starts over
    given = given || part.kind == RecipeKind::kGiven;
    const Bytes left = add(part, need, &choice);
    before = need - left;
    need = left;
  }
  if (everything != nullptr) *everything = need > Bytes{0};
  leave_out_remade(menu_, given, &choice);
  sort_ids(&choice.recompute);
  sort_ids(&choice.offload_values);
  sort_ids(&choice.offload_states);
  return choice;
}

AutoChoice Recipes::everything_away() const {
  AutoChoice choice;
  for (const Movable& each : menu_.values({}, true)) {
    choice.offload_values.push_back(ValueId{each.id});
  }
  for (const Movable& each : menu_.states()) choice.offload_states.push_back(ParamId{each.id});
  sort_ids(&choice.offload_values);
  sort_ids(&choice.offload_states);
  return choice;
}

std::vector<Recipe> Recipes::all() {
  const RecipePart states{RecipeKind::kStates, true}, values{RecipeKind::kValues, true};
  const RecipePart every_state{RecipeKind::kStates, false}, all_values{RecipeKind::kValues, false};
  const RecipePart recompute{RecipeKind::kRecompute, false};
  return {
      {recompute, states, all_values, every_state},
      {states, recompute, all_values, every_state},
      {states, values, recompute, all_values, every_state},
      {values, recompute, all_values, every_state},
      all_states(),
      {all_values, every_state, recompute},
  };
}

Recipe Recipes::all_states() {
  return {
      {RecipeKind::kStates, false}, {RecipeKind::kRecompute, false}, {RecipeKind::kValues, false}};
}

std::vector<Recipe> Recipes::tight() {
  const RecipePart states{RecipeKind::kStates, true}, all_states{RecipeKind::kStates, false};
  const RecipePart recompute{RecipeKind::kRecompute, false}, all_values{RecipeKind::kValues, false};
  const RecipePart given{RecipeKind::kGiven, false};
  return {
      {recompute, all_values, all_states, given},
      {recompute, all_values, states, given, all_states},
  };
}

std::vector<Recipe> Recipes::by_cost(Bytes need) const {
  std::vector<std::pair<Nanos, Recipe>> order;
  std::vector<AutoChoice> seen;
  for (const Recipe& recipe : all()) {
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
Nanos Recipes::cost_of(const AutoChoice& choice) const {
  const std::vector<bool> again = marked(choice.recompute, regions_);
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

}  // namespace deepcompile
