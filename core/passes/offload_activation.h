// SPDX-License-Identifier: Apache-2.0
// Moves saved activations to the host between forward and backward, for as
// many bytes as the memory budget asks.
//
//   forward 0            forward 0
//     run f1               run f1
//     run f2               offload (s1)   # beside f2
//   backward 0     =>      run f2
//     run b2               evict (s1)     # the copy is done
//     run b1 (s1)        backward 0
//                          reload (s1)    # beside b2
//                          run b2
//                          await (s1)
//                          run b1
//
// The values that wait longest for the backward go first: they free most for
// what their copies cost. A copy out starts when the value is made, and its
// memory is given back where the copy is expected to be done, or earlier
// where memory is needed; a copy in starts as late as it is in time, and not
// before there is room.
//
// Sizes are the program's. Values that share storage with others (views) look
// like values of their own; their memory is free only when all of it has left.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "passes/pass.h"

namespace deepcompile {

struct OffloadActivationOptions {
  std::optional<std::vector<ValueId>> values = std::nullopt;  // absent: as the budget asks
  Bytes smallest{int64_t{64} << 10};                          // unless named, smaller values stay
  // The program's timeline, if the caller has it already.
  const MemoryTimeline* timeline = nullptr;
};

class OffloadActivation final : public Pass {
 public:
  explicit OffloadActivation(OffloadActivationOptions options = {})
      : options_(std::move(options)) {}

  std::string_view name() const override { return "offload_activation"; }
  std::string_view summary() const override {
    return "saved activations wait on the host, copied beside compute, by budget";
  }
  Contract contract() const override { return {}; }
  // Throws UserError if `values` names one that cannot move. If the budget
  // cannot be reached, does what helps most and says so.
  void run(StepProgram& program, PassContext& context) const override;

 private:
  OffloadActivationOptions options_;
};

}  // namespace deepcompile
