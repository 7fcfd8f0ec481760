// SPDX-License-Identifier: Apache-2.0
// Moves gathers earlier in their section, so that transfers hide behind
// compute.
//
//   gather a          gather a
//   wait a            gather b      # beside run fa
//   run fa       =>   wait a
//   release a         run fa
//   gather b          release a
//   wait b            wait b
//   run fb            run fb
//
// How far is one number a section, the limit: at no point are more bytes than
// that gathered and not yet at the place where the program gathered them. A
// gather goes to the earliest place that the limit, the gather before it and
// the last instruction on its own parameter (release, update) allow. So the
// order of collectives is a function of the parameters, the order of the runs
// and the limits: not of times, and not of sizes that differ between ranks.
//
// Memory decides within that order: a gather that does not fit the budget yet
// waits until it does, as long as it stays ahead of the next reduction; if it
// cannot, the limit is too large. The largest limit up to `ahead` is the first
// choice; with a simulator, fractions of it are tried, then each section as it
// was, and the fastest step wins; among equals, the one that moves less. Ranks
// that must issue the same collectives run one rank's choice: `agreed`.
//
// The link carries one transfer at a time, in issue order, as the simulator
// and the runtime have it.
#pragma once

#include <vector>

#include "passes/pass.h"

namespace deepcompile {

struct PrefetchOptions {
  // Most bytes gathered ahead of use.
  Bytes ahead{int64_t{4} << 30};
  // Most steps simulated while choosing.
  int simulations = 16;
  // Not empty: `ahead`, section by section. A negative one leaves its section as it is.
  std::vector<Bytes> most = {};
  // Lets a gather that does not fit yet wait until it does, also behind
  // reductions: more hides, but the order then depends on sizes and on the
  // budget. For plans that one rank makes for all.
  bool any_order = false;
  // Not empty: use exactly these limits, one a section, instead of choosing.
  // A negative one leaves its section as it is.
  std::vector<Bytes> agreed = {};
  // The program's timeline, if the caller has it already.
  const MemoryTimeline* timeline = nullptr;
};

class Prefetch final : public Pass {
 public:
  explicit Prefetch(PrefetchOptions options = {}) : options_(std::move(options)) {}

  std::string_view name() const override { return "prefetch"; }
  std::string_view summary() const override {
    return "gather earlier, within the memory budget, so that transfers hide behind compute";
  }
  Contract contract() const override;
  // Throws UserError if the program is above the budget already, or `agreed`
  // does not fit the program or the budget.
  void run(StepProgram& program, PassContext& context) const override;

 private:
  PrefetchOptions options_;
};

}  // namespace deepcompile
