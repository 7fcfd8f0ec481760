// SPDX-License-Identifier: Apache-2.0
// Runs regions of a forward again in its backward instead of keeping what they
// made: memory for compute.
//
//   forward 0            forward 0
//     run f1               run f1       # s1 and x are dropped here
//     run f2               run f2
//   backward 0       =>  backward 0
//     run b2 (s2)          run b2 (s2)
//     run b1 (s1)          run f1       # from what f1 was given
//                          run b1 (s1)
//
// Equal layers are recomputed layer by layer: what a layer hands to the next
// is kept, and inside of it as much is dropped as is chosen, so everything from
// single regions to the whole layer from its input is there. A layer is run
// again as a chain, just before the first instruction that needs any of it.
//
// Choosing goes by the fullest point of the step: what frees memory there for
// the least time a byte is recomputed, the user's marks first (Region.
// checkpoint), until the peak is within the budget. Regions that draw random
// numbers or write to their inputs (`once`), and those that read a section
// input that such a region also reads, are never run again.
#pragma once

#include <optional>
#include <vector>

#include "passes/pass.h"

namespace deepcompile {

struct RematerializeOptions {
  // Forward regions whose saved outputs are dropped and made again; those of
  // which nothing is needed again are left alone. Absent: choose by budget.
  std::optional<std::vector<RegionId>> recompute = std::nullopt;
};

class Rematerialize final : public Pass {
 public:
  explicit Rematerialize(RematerializeOptions options = {}) : options_(std::move(options)) {}

  std::string_view name() const override { return "rematerialize"; }
  std::string_view summary() const override {
    return "run regions again in the backward instead of keeping their outputs, by budget";
  }
  Contract contract() const override { return {}; }
  // Throws UserError if `recompute` names a region that cannot run again. If
  // the budget cannot be reached, does what helps most and says so.
  void run(StepProgram& program, PassContext& context) const override;

 private:
  RematerializeOptions options_;
};

}  // namespace deepcompile
