// SPDX-License-Identifier: Apache-2.0
// Data parallel training with everything on every rank (stage 0): each
// gradient is reduced when it is complete, then each parameter updated.
#pragma once

#include "passes/pass.h"

namespace deepcompile {

class Zero0Compile final : public Pass {
 public:
  std::string_view name() const override { return "zero0_compile"; }
  std::string_view summary() const override {
    return "stage 0: reduce each gradient once, update; every parameter on every rank";
  }
  Contract contract() const override;
  // Throws UserError if a parameter is not replicated.
  void run(StepProgram& program, PassContext& context) const override;
};

}  // namespace deepcompile
