// SPDX-License-Identifier: Apache-2.0
// A pass: a function of (program, context) that edits the program.
//
// Same program, same context, same result, byte for byte: no clock, no
// collective, no global, no environment. A pass that may fail throws
// UserError; the pipeline then leaves the program as it was.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "ir/program.h"
#include "passes/environment.h"
#include "passes/fact.h"

namespace deepcompile {

// What a pass gets besides the program. Made by the pipeline, one a pass.
class PassContext {
 public:
  PassContext(StepProgram& program, std::string pass, PassEnvironment environment = {})
      : program_(program), pass_(std::move(pass)), environment_(std::move(environment)) {}

  const std::string& pass() const { return pass_; }
  const PassEnvironment& environment() const { return environment_; }

  // Records why a choice was made, e.g. because(param, "kept whole: saves 1.8
  // ms a step for 96 MiB"). The report shows it. Without an object, it is
  // about the whole step.
  void because(ParamId param, std::string text);
  void because(RegionId region, std::string text);
  void because(std::string text);

 private:
  StepProgram& program_;
  std::string pass_;
  PassEnvironment environment_;
};

// For passes that give memory back: the peak that is above the budget. Nothing
// if there is no budget or the peak is within it; then the reason is `what`,
// e.g. "all activations stay".
std::optional<Bytes> peak_above_budget(const StepProgram& program, PassContext& context,
                                       const std::string& what);

// Throws UserError, of `pass`, unless the two differ in instructions and reasons alone, which are
// what a pass edits: the code behind a region knows its operands, the ranks agreed on the step's
// header, and later passes and the budget rely on sizes and times.
void check_tables(const StepProgram& before, const StepProgram& after, const std::string& pass);

class Pass {
 public:
  virtual ~Pass() = default;

  virtual std::string_view name() const = 0;     // also its word in configs, tests and docs
  virtual std::string_view summary() const = 0;  // one line, for lists of passes
  virtual Contract contract() const = 0;
  virtual void run(StepProgram& program, PassContext& context) const = 0;
};

}  // namespace deepcompile
