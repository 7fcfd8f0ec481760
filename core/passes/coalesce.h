// SPDX-License-Identifier: Apache-2.0
// Brings together what can be given to a stream together: between two runs, what
// concerns compute goes first, then transfers, in the orders they had.
//
//   update a             update a
//   gather a             update b
//   update b       =>    gather a
//   gather b             gather b
//
// The runtime then starts one kernel for the updates (or sums of reductions) that
// stand together, and tells the peers once of the transfers (Batch in
// core/runtime/comm/transport.h). Up to 8 transfers go together, and no more than 256
// MiB: what a start costs is little beside the time of larger ones, which would wait for
// each other's updates. A section begins with 1, 2 and 4, so that its first run does not
// wait for many. Of waits that stand together the one for the last gather comes first:
// those behind it are over then.
//
// A section where the step's peak would be higher stays as it was: an accumulation, which makes
// the gradient's shard, may come before a reduction, which gives the gradient back. Source of the
// idea: multi-tensor optimizers (Apex) and coalesced collectives (NCCL's groups).
#pragma once

#include "passes/pass.h"

namespace deepcompile {

class Coalesce final : public Pass {
 public:
  std::string_view name() const override { return "coalesce"; }
  std::string_view summary() const override {
    return "updates and transfers that stand between the same runs start together";
  }
  Contract contract() const override { return {}; }
  void run(StepProgram& program, PassContext& context) const override;
};

// The same, without a reason.
void coalesce(StepProgram* program);

}  // namespace deepcompile
