// SPDX-License-Identifier: Apache-2.0
#include "cost/cached_costs.h"

namespace deepcompile {

CachedCosts::CachedCosts(const StepProgram& like, const Estimator& costs)
    : costs_(costs), params_(like.params.size()), runs_(like.regions.size(), kUnknown) {
  sections_.fill(kUnknown);
}

Nanos CachedCosts::duration(const StepProgram& program, Op op, const Instr& instr) const {
  if (op == Op::kRun) {
    return known(runs_[index(*instr.region)], [&] { return costs_.duration(program, instr); });
  }
  const auto ask = [&] { return costs_.duration(program, {op, instr.param, std::nullopt, {}}); };
  if (op == Op::kNorm) return known(norm_, ask);
  if (!instr.param) return costs_.duration(program, instr);
  return known(of_param(of_params_[static_cast<size_t>(op)], *instr.param), ask);
}

Nanos CachedCosts::local_sum(const StepProgram& program, ParamId id) const {
  return known(of_param(local_sums_, id), [&] { return costs_.local_sum(program, id); });
}

Nanos CachedCosts::staging(const StepProgram& program, ParamId id) const {
  return known(of_param(stagings_, id), [&] { return costs_.staging(program, id); });
}

Nanos CachedCosts::section_overhead(const StepProgram& program, SectionKind kind) const {
  return known(sections_[static_cast<size_t>(kind)],
               [&] { return costs_.section_overhead(program, kind); });
}

}  // namespace deepcompile
