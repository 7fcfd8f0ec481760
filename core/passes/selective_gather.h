// SPDX-License-Identifier: Apache-2.0
// Keeps sharded parameters whole between two uses, so that the second needs no
// gather, for as many as the memory budget holds.
//
//   forward 0            forward 0
//     gather a             gather a
//     wait a               wait a
//     run fa          =>   run fa
//     release a          backward 0
//   backward 0             gather a     # nothing to do: a is whole
//     gather a             wait a
//     wait a               run ba
//     run ba               release a
//     release a
//
// A choice is a gap: from a release to the next gather of the same parameter,
// in one section, from forward to backward, or from the end of a micro batch
// to the next one's start. Closing it costs the full buffer for its length and
// saves the gather, each time the gap is passed in a step; an update between
// makes the buffer stale and saves nothing. Gaps are closed in the order of
// time saved per byte, the shorter first among equals, while every point of
// the step stays within the budget.
//
// A later section keeps its gather: sections are valid whatever ran before
// them, and the gather of what is whole is free. Ranks must close the same
// gaps, so one rank's program is run by all.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "passes/gaps.h"
#include "passes/pass.h"

namespace deepcompile {

struct SelectiveGatherOptions {
  // Part of the memory budget that is left free.
  Bytes reserve{0};
  // Gaps that save no more than this a step stay open.
  Nanos least_saving{0};
  // Set: close exactly these gaps, whatever the budget, instead of choosing.
  std::optional<std::vector<GapId>> keep = std::nullopt;
  // The program's timeline, if the caller has it already.
  const MemoryTimeline* timeline = nullptr;
};

// The gaps that the pass would close if it did not simulate, sorted. Throws
// UserError if the program is above the environment's budget.
std::vector<GapId> gaps_worth_closing(const StepProgram& program,
                                      const PassEnvironment& environment,
                                      const SelectiveGatherOptions& options);

class SelectiveGather final : public Pass {
 public:
  explicit SelectiveGather(SelectiveGatherOptions options = {}) : options_(std::move(options)) {}

  std::string_view name() const override { return "selective_gather"; }
  std::string_view summary() const override {
    return "keep parameters whole between uses, by time saved per byte, up to the memory budget";
  }
  Contract contract() const override;
  // Throws UserError without an estimator or a budget, or if the program is
  // above the budget already.
  void run(StepProgram& program, PassContext& context) const override;

 private:
  SelectiveGatherOptions options_;
};

}  // namespace deepcompile
