// SPDX-License-Identifier: Apache-2.0
#include "passes/pass.h"

namespace deepcompile {

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

}  // namespace deepcompile
