// SPDX-License-Identifier: Apache-2.0
// Chooses where in the step the optimizer runs.
//
//   step           the update section updates everything, as the zero passes leave it
//   next_forward   the update section defers; the next forward updates each
//                  parameter shortly before it gathers it, so that updates,
//                  transfers and runs overlap
//   backward       each parameter right after its gradient is accumulated,
//                  beside the reductions that follow
//
//   update           update
//     update a         defer a
//     update b         defer b
//   forward 0        forward 0
//     gather a         update a
//     wait a     =>    gather a
//     run fa           update b      # beside the gather of a
//     gather b         wait a
//     ...              run fa ...
//
// A parameter that no forward uses, or that cannot be updated early, keeps its
// update where it is. In the backward a parameter is updated only after the
// step's last use of it, and never in a step that clips: the norm comes later.
// The update section keeps its update, which finds nothing left to do.
// Optimizer states that move to the host move with their update; if forwards
// run several times a step, such parameters stay in the update section.
//
// `gather P` applies what was deferred, so any section that gathers first is
// right, whichever runs next.
#pragma once

#include <optional>
#include <string_view>

#include "passes/pass.h"

namespace deepcompile {

enum class Place : uint8_t { kStep, kNextForward, kBackward };

std::string_view to_string(Place place);  // "step", "next_forward", "backward"

struct PlaceOptimizerOptions {
  // Absent: simulate what is allowed, each as prefetch leaves it, and take the
  // fastest within the budget.
  std::optional<Place> place = std::nullopt;
  // next_forward: an update stands this many runs before the first that uses
  // its parameter. Absent: tries some.
  std::optional<int> ahead = std::nullopt;
};

class PlaceOptimizer final : public Pass {
 public:
  explicit PlaceOptimizer(PlaceOptimizerOptions options = {}) : options_(options) {}

  std::string_view name() const override { return "place_optimizer"; }
  std::string_view summary() const override {
    return "update in the update section, through the next forward or beside the backward";
  }
  Contract contract() const override;
  // Throws UserError if a given place is not possible.
  void run(StepProgram& program, PassContext& context) const override;

 private:
  PlaceOptimizerOptions options_;
};

}  // namespace deepcompile
