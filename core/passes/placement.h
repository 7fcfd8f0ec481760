// SPDX-License-Identifier: Apache-2.0
// What zero0_compile, zero1_compile and zero3_compile do alike: reductions in a
// backward, and the update.
#pragma once

#include <string_view>
#include <vector>

#include "ir/program.h"

namespace deepcompile {

// Most reductions under way at once: one on the link, one waiting for it.
inline constexpr size_t kReductionsInFlight = 2;

// Appends reductions to a section that is being rebuilt run by run. A
// parameter is reduced after the run that makes its last gradient; parameters
// that one run completes go in id order, so the order is the same on every
// rank. Before a third reduction starts, the oldest is accumulated.
class ReductionPlacer {
 public:
  // `runs` are the section's instructions before the pass.
  ReductionPlacer(const StepProgram& program, const std::vector<Instr>& runs);

  void after_run(const Instr& run, std::vector<Instr>* out);
  void at_end(std::vector<Instr>* out);

  // How many parameters have been reduced so far.
  size_t count() const { return count_; }

 private:
  void accumulate_oldest(std::vector<Instr>* out);

  const StepProgram& program_;
  std::vector<std::vector<ValueId>> gradients_;  // by parameter: made so far
  std::vector<size_t> missing_;                  // by parameter: runs still to make some
  std::vector<ParamId> in_flight_;
  size_t count_ = 0;
};

// Throws UserError in the name of `pass` if the program holds anything but runs.
void check_compute_only(const StepProgram& program, std::string_view pass);

// A backward of runs alone, with its reductions. Returns how many there are.
size_t place_reductions(const StepProgram& program, Section* backward);

// norm (if the step clips), then each trainable parameter in id order.
std::vector<Instr> place_updates(const StepProgram& program);

}  // namespace deepcompile
