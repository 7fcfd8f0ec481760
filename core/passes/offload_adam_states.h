// SPDX-License-Identifier: Apache-2.0
// Keeps optimizer states (master copies and moments) on the host, except
// around their update, for as many parameters as the memory budget asks.
//
//   update                  backward 0
//     update a                ...
//     update b                reload_states a    # late, where there is room
//     update c      =>      update
//                             await_states a
//                             update a
//                             offload_states a   # beside the updates of b and c
//                             update b
//                             update c
//                           forward 0            # of the next step
//                             run f0
//                             evict_states a     # the copy is done
//
// The largest states go first, until the fullest point of the step is within
// the budget. Copies go beside compute: in, as late as they are in time and
// where there is room; out, until they are expected to be done or memory is
// needed. Moves cross into the backward before and the forward after only if a
// step is one micro batch; else they stay in the section of the update. Where
// place_optimizer has put an update into a forward or backward already, the
// moves stand around it there; a forward's may end in the backward.
//
// The `_sync` pass copies directly before and after each update instead.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "passes/pass.h"

namespace deepcompile {

struct OffloadAdamStatesOptions {
  std::optional<std::vector<ParamId>> params = std::nullopt;  // absent: as the budget asks
  bool synchronous = false;
  // The program's timeline, if the caller has it already.
  const MemoryTimeline* timeline = nullptr;
};

class OffloadAdamStates final : public Pass {
 public:
  explicit OffloadAdamStates(OffloadAdamStatesOptions options = {})
      : options_(std::move(options)) {}

  std::string_view name() const override {
    return options_.synchronous ? "offload_adam_states_sync" : "offload_adam_states";
  }
  std::string_view summary() const override {
    return options_.synchronous
               ? "optimizer states on the host, copied in and out at each update, by budget"
               : "optimizer states on the host, copied in and out beside compute, by budget";
  }
  Contract contract() const override;
  // Throws UserError if `params` names one without states to move.
  void run(StepProgram& program, PassContext& context) const override;

 private:
  OffloadAdamStatesOptions options_;
};

}  // namespace deepcompile
