// SPDX-License-Identifier: Apache-2.0
// ZeRO-1 and 2: every rank holds the whole weights and its shard of the
// optimizer states. Nothing is gathered in forwards and backwards; each
// gradient is reduced when it is complete; each parameter is gathered right
// behind its update, so that the link works beside the updates that follow.
//
//   update           update
//                =>    update P
//                      gather P
//                      update Q
//                      gather Q
//                      wait P
//                      wait Q
//
// The two stages differ in the program, not in the pass: in stage 1
// (`boundary`) a rank sums its gradients over the micro batches and the
// reductions of the last one send them; in stage 2 each micro batch reduces.
#pragma once

#include "passes/pass.h"

namespace deepcompile {

class Zero1Compile final : public Pass {
 public:
  std::string_view name() const override { return "zero1_compile"; }
  std::string_view summary() const override {
    return "stages 1 and 2: weights whole, reduce once, update a shard, gather behind each update";
  }
  Contract contract() const override;
  // Throws UserError if a parameter is not placed whole.
  void run(StepProgram& program, PassContext& context) const override;
};

}  // namespace deepcompile
