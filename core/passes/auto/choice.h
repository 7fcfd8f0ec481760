// SPDX-License-Identifier: Apache-2.0
// What `auto` chooses, as data: explicit sets and limits, from which the other
// passes make the plan. Equal choices make equal plans.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "passes/gaps.h"
#include "passes/place_optimizer.h"

namespace deepcompile {

struct AutoChoice {
  // Each sorted by id.
  std::vector<RegionId> recompute;      // forward regions that the backward runs again
  std::vector<ValueId> offload_values;  // saved activations that wait on the host
  std::vector<ParamId> offload_states;  // parameters whose optimizer states live on the host
  Bytes spare;  // part of the budget that copies in from the host leave free

  Place place = Place::kStep;
  int ahead = 1;  // runs that next_forward updates ahead of the use

  // Gaps to close. Absent: by worth, while the budget less `reserve` holds them.
  std::optional<std::vector<GapId>> keep = std::vector<GapId>{};
  Bytes reserve;

  // Most bytes gathered ahead of use: one limit a section, or one for all of
  // them, lowered where the budget asks. Negative or neither: gathers stay.
  std::vector<Bytes> limits;
  std::optional<Bytes> prefetch = std::nullopt;

  int order_simulations = 0;  // of order_link; 0 leaves it out
  bool coalesce = false;

  bool operator==(const AutoChoice&) const = default;
};

// What the simulator says of a choice.
struct Trial {
  Nanos time;
  Bytes peak;
  bool fits = false;  // valid, and within the budget

  bool operator==(const Trial&) const = default;
};

// Whether `a` is the better one: within the budget before above it; then by
// time, or by peak while above; the smaller peak among equals.
bool better(const Trial& a, const Trial& b);

// "recompute 12 regions, update in next_forward 4 runs ahead, ...".
std::string describe(const AutoChoice& choice);

// What cannot be read off a plan: "levels: spare=0B ahead=4 order=16 coalesce=1 limits=1GiB,-,-".
// read_levels takes a text that print_levels made, and leaves the choice as it
// is at any other.
std::string print_levels(const AutoChoice& choice);
void read_levels(const std::string& text, AutoChoice* choice);

}  // namespace deepcompile
