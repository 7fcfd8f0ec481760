// SPDX-License-Identifier: Apache-2.0
// The search of `auto`: choices in, the best one it finds out. First by levels
// (how many bytes to free, in which way, and what to spend them on), for steps
// of any size; then, for small ones, by single regions, values, parameters,
// gaps and limits.
//
// The number of simulations, and of programs built to see their peak, depends on
// the program's size, and on whether anything fits.
#pragma once

#include <map>
#include <optional>
#include <vector>

#include "passes/auto/builders.h"
#include "passes/auto/memory_menu.h"
#include "passes/auto/recipes.h"

namespace deepcompile {

struct Found {
  AutoChoice choice;
  Trial trial;
};

inline Bytes part_of(Bytes bytes, double part) {
  return {static_cast<int64_t>(static_cast<double>(bytes.value) * part)};
}

// More simulations than this are plenty: those of programs whose plans are soon simulated.
constexpr int kPlenty = 100;

// How many of these a search of this program may make.
int simulations_for(const StepProgram& classical);

// How far a search by levels has come.
struct LevelState {
  Found best;
  Recipe recipe;  // of best
  Bytes plain_peak;
  std::map<Recipe, Bytes> bias;  // of the estimates, as found before
  std::vector<Found> measured;
  int left = 0;  // simulations, and programs built to see their peak
};

// Choices tried one after the other, from a state that others start from too.
class LevelTry {
 public:
  LevelTry(AutoBuilder& builder, const Recipes& recipes, const LevelState& from)
      : builder_(builder), recipes_(recipes), from_(from), best_(from.best) {}

  // Each takes the choice if it is better than the best so far.
  bool attempt(const AutoChoice& choice);
  bool attempt_keeping(AutoChoice choice);
  void try_recipe(const Recipe& recipe, double room);
  // `most`: of the peak. Updates and states come as in `like`.
  void try_more(const Recipe& recipe, Bytes most, const AutoChoice& like);
  void try_all_again(std::optional<AutoChoice>* all_again);

  const Found& best() const { return best_; }
  // What was found stays only if it makes the step so many times shorter.
  void only_if_it_helps(int64_t times);
  // Makes what was found here, if it is better than what was found since, part of the state. All
  // that start from it have ended.
  void put_into(LevelState* state) const;

 private:
  Trial measure(const AutoChoice& choice);
  AutoChoice fit(const Recipe& recipe, Bytes target, const AutoChoice& like);
  bool take(AutoChoice choice, const Trial& trial);
  int left() const { return from_.left - used_; }

  AutoBuilder& builder_;
  const Recipes& recipes_;
  const LevelState& from_;
  Found best_;
  Recipe recipe_;  // of best_, if that was found by one
  bool found_ = false;
  std::map<Recipe, Bytes> bias_;
  std::vector<Found> measured_;
  int used_ = 0;
};

class LevelSearch {
 public:
  LevelSearch(Builders& builders, const MemoryMenu& menu, int simulations)
      : builders_(builders), recipes_(menu, builders.first().classical().regions.size()) {
    state_.left = simulations;
  }

  // Updates are together, or in the backward if they may be there, else in the next forward.
  // Starts from the classical plan; the result may be above the budget, and is
  // then the one with the smallest peak.
  Found run();
  const Found& classical() const { return classical_; }
  // Everything run again, where there is a budget that may be worth it for.
  const std::optional<AutoChoice>& all_again() const { return all_again_; }

 private:
  const AutoBuilder& builder() const { return builders_.first(); }
  Bytes budget() const { return builder().budget(); }
  const Found& best() const { return state_.best; }
  // Where updates are beside something else.
  Place spread() const {
    return builder().early_updates() ? Place::kBackward : Place::kNextForward;
  }
  // ask(a try, i) for each i below `count`, side by side, from the state as it is; then the best of
  // them is part of it.
  template <typename Ask>
  void each(size_t count, const Ask& ask);
  void each_keeping(const std::vector<AutoChoice>& choices);
  void attempt(const AutoChoice& choice);

  void try_recipes();
  void try_smallest();
  void try_places();
  void try_room();
  bool is_short() const;
  void try_more_memory();
  void improve();
  void try_second_start();
  void try_recompute_all();

  Builders& builders_;
  Recipes recipes_;
  LevelState state_;
  Found classical_;
  std::optional<AutoChoice> all_again_;
};

// Improves `start` one toggle, then two, at a time.
Found toggle_search(AutoBuilder& builder, const MemoryMenu& menu, const std::vector<Found>& starts,
                    int simulations);

}  // namespace deepcompile
