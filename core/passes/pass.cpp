// SPDX-License-Identifier: Apache-2.0
#include "passes/pass.h"

#include "base/error.h"
#include "ir/text.h"

namespace deepcompile {
namespace {

std::string tables_of(StepProgram program) {
  for (Section& section : program.sections) section.instrs.clear();
  program.reasons.clear();
  return print(program);
}

}  // namespace

void PassContext::because(ParamId param, std::string text) {
  if (!environment_.reasons) return;
  program_.reasons.push_back({pass_, program_.param(param).name, std::move(text)});
}

void PassContext::because(RegionId region, std::string text) {
  if (!environment_.reasons) return;
  program_.reasons.push_back({pass_, program_.region(region).name, std::move(text)});
}

void PassContext::because(std::string text) {
  if (!environment_.reasons) return;
  program_.reasons.push_back({pass_, "", std::move(text)});
}

std::optional<Bytes> peak_above_budget(const StepProgram& program, PassContext& context,
                                       const std::string& what) {
  const auto budget = context.environment().memory_budget;
  if (!budget) {
    context.because(what + ": no memory budget is given");
    return std::nullopt;
  }
  const Bytes peak = memory_peak(program);
  if (peak > *budget) return peak;
  context.because(what + ": the peak of " + pretty(peak) + " is within the budget of " +
                  pretty(*budget));
  return std::nullopt;
}

void check_tables(const StepProgram& before, const StepProgram& after, const std::string& pass) {
  if (tables_of(before) == tables_of(after)) return;
  throw UserError(pass + ": changed the program's tables. A pass edits instructions alone.");
}

}  // namespace deepcompile
