// SPDX-License-Identifier: Apache-2.0
// Classical ZeRO-3: in each section, gather a sharded parameter before its
// first use and release it after its last; reduce each gradient when it is
// complete; update, then gather again what is kept whole. Transfers stand
// where they are needed: other passes move them.
//
//   run a (x, P) -> (y)        gather P
//   run b (y, P) -> (z)   =>   wait P
//                              run a
//                              run b
//                              release P
#pragma once

#include "passes/pass.h"

namespace deepcompile {

class Zero3Compile final : public Pass {
 public:
  std::string_view name() const override { return "zero3_compile"; }
  std::string_view summary() const override {
    return "stage 3: gather before first use, release after last, reduce once, update";
  }
  Contract contract() const override;
  void run(StepProgram& program, PassContext& context) const override;
};

}  // namespace deepcompile
