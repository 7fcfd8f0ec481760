// SPDX-License-Identifier: Apache-2.0
// Ways to free device memory, as lists of what to take from the menu first: choices of so many
// bytes, by the menu's estimates. How large the peak then is, is for others to find out.
#pragma once

#include <compare>
#include <cstdint>
#include <vector>

#include "passes/auto/choice.h"
#include "passes/auto/memory_menu.h"

namespace deepcompile {

// kGiven: activations that are there for regions that run again, though their own does too.
enum class RecipeKind : uint8_t { kRecompute, kValues, kStates, kGiven };

struct RecipePart {
  RecipeKind kind;
  bool hidden;  // no more than the link moves beside compute

  auto operator<=>(const RecipePart&) const = default;
};
using Recipe = std::vector<RecipePart>;

class Recipes {
 public:
  // Of a program with so many regions. The menu outlives this.
  Recipes(const MemoryMenu& menu, size_t regions) : menu_(menu), regions_(regions) {}

  static std::vector<Recipe> all();
  static Recipe all_states();
  // For when none of all() fits, or simulations are plenty.
  static std::vector<Recipe> tight();
  // All by what they are expected to cost for so many bytes, cheapest first; those that come
  // to the same are there once.
  std::vector<Recipe> by_cost(Bytes need) const;

  // The recipe's first so many bytes.
  // `everything`: whether that is all it has, and less than is needed.
  AutoChoice fill(const Recipe& recipe, Bytes need, bool* everything = nullptr) const;
  // All that can wait on the host, and nothing run again.
  AutoChoice everything_away() const;

 private:
  Bytes add(const RecipePart& part, Bytes need, AutoChoice* choice) const;
  Nanos cost_of(const AutoChoice& choice) const;

  const MemoryMenu& menu_;
  size_t regions_;
};

// What runs again does not wait on the host too, unless `given` (MemoryMenu::given).
void leave_out_remade(const MemoryMenu& menu, bool given, AutoChoice* choice);

}  // namespace deepcompile
