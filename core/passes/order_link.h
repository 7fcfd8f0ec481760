// SPDX-License-Identifier: Apache-2.0
// Orders what is issued to the link, which carries one transfer at a time in
// issue order: what is waited for first goes first.
//
//   run b1               run b1
//   reduce a (g)         gather c       # its wait comes before a's accumulate
//   gather c         =>  reduce a (g)
//   wait c               wait c
//   run b2               run b2
//   accumulate a         accumulate a
//
// Three kinds of edits, of backwards mostly:
//   - a reduction lets later gathers pass whose wait comes before its own
//     accumulation, also behind the next run or two;
//   - an accumulation stands later, so that compute does not stop for a
//     reduction that nothing needs yet; the buffers of more reductions are
//     there at once;
//   - in a forward that updates, the longest of the updates before the first
//     gather, and the gather that it holds back, let the other gathers before the
//     first run pass: of an embedding that is exchanged by rows the update takes
//     long and the gather nothing, and the link would stand idle meanwhile.
// The collectives of a section stay the same, reductions in the same order
// among themselves and gathers too, but for that one. An edit stays if the
// simulated step is faster and its peak within the budget.
#pragma once

#include "passes/pass.h"

namespace deepcompile {

struct OrderLinkOptions {
  int simulations = 16;  // most steps simulated while choosing
};

class OrderLink final : public Pass {
 public:
  explicit OrderLink(OrderLinkOptions options = {}) : options_(options) {}

  std::string_view name() const override { return "order_link"; }
  std::string_view summary() const override {
    return "issue first what is waited for first; accumulate when the reduction is done";
  }
  Contract contract() const override { return {}; }
  // Without a simulator it changes nothing, and says so.
  void run(StepProgram& program, PassContext& context) const override;

 private:
  OrderLinkOptions options_;
};

}  // namespace deepcompile
