// SPDX-License-Identifier: Apache-2.0
// Facts about a program that passes build on, and a pass's contract in them.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string_view>
#include <vector>

#include "ir/program.h"

namespace deepcompile {

enum class Fact : uint8_t {
  kGathersPlaced,     // sharded parameters are gathered where forwards and backwards use them
  kReductionsPlaced,  // gradients are reduced and accumulated
  kUpdatesPlaced,     // the update section updates
  kRegionsTimed,      // every region has a measured or estimated time
};
inline constexpr int kFactCount = 4;

std::string_view to_string(Fact fact);  // "gathers_placed", ...
std::optional<Fact> parse_fact(std::string_view word);

// What a pass wants of the program, and what it makes true. The pipeline
// checks the contracts of all its passes before it runs the first.
struct Contract {
  std::vector<Fact> needs = {};      // hold before it
  std::vector<Fact> provides = {};   // hold after it
  std::vector<Fact> conflicts = {};  // must not hold before it
};

// The facts that can be read off a program as it stands.
std::set<Fact> facts_of(const StepProgram& program);

}  // namespace deepcompile
