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

#include "passes/auto_builder.h"
#include "passes/memory_menu.h"
#include "passes/recipes.h"

namespace deepcompile {

struct Found {
  AutoChoice choice;
  Trial trial;
};

inline Bytes part_of(Bytes bytes, double part) {
  return {static_cast<int64_t>(static_cast<double>(bytes.value) * part)};
}

// How many of these a search of this program may make.
int simulations_for(const StepProgram& classical);

class LevelSearch {
 public:
  LevelSearch(AutoBuilder& builder, const MemoryMenu& menu, int simulations)
      : builder_(builder), recipes_(menu, builder.classical().regions.size()), left_(simulations) {}

  // Updates are together, or in the backward if they may be there, else in the next forward.
  // Starts from the classical plan; the result may be above the budget, and is
  // then the one with the smallest peak.
  Found run();
  const Found& classical() const { return classical_; }
  // Everything run again, where there is a budget that may be worth it for.
  const std::optional<AutoChoice>& all_again() const { return all_again_; }

 private:
  // Where updates are beside something else.
  Place spread() const { return builder_.early_updates() ? Place::kBackward : Place::kNextForward; }
  Trial measure(const AutoChoice& choice);
  bool attempt(const AutoChoice& choice);
  bool attempt_keeping(const AutoChoice& choice);
  AutoChoice fit(const Recipe& recipe, Bytes target, Place place);
  void try_recipe(const Recipe& recipe, double room);
  void try_spread();
  void try_recipes();
  void try_smallest();
  void try_places();
  void try_ahead();
  void try_reserve();
  bool is_short() const;
  void try_more_memory();
  void try_recompute_all();

  AutoBuilder& builder_;
  Recipes recipes_;
  int left_;
  Bytes plain_peak_;
  Found classical_, best_;
  Recipe recipe_;  // of best_
  std::optional<AutoChoice> all_again_;
  std::map<Recipe, Bytes> bias_;
  std::vector<Found> measured_;
};

// Improves `start` one toggle, then two, at a time.
Found toggle_search(AutoBuilder& builder, const MemoryMenu& menu, const std::vector<Found>& starts,
                    int simulations);

}  // namespace deepcompile
