// SPDX-License-Identifier: Apache-2.0
// An estimator's answers, each asked for once. A planner simulates one step by the hundred under
// other orders, and the simulator runs a micro batch again and again.
#pragma once

#include <array>
#include <vector>

#include "cost/cost_model.h"

namespace deepcompile {

// For programs with the parameters, regions, world, accumulation and dtypes of one: instructions
// may differ, tables may not. Not thread-safe. `costs` outlives it.
class CachedCosts final : public Estimator {
 public:
  CachedCosts(const StepProgram& like, const Estimator& costs);

  Nanos duration(const StepProgram& program, const Instr& instr) const override {
    return duration(program, instr.op, instr);
  }
  // Of `op` on the instruction's operand. Copies of values are asked for every time.
  Nanos duration(const StepProgram& program, Op op, const Instr& instr) const;
  Nanos local_sum(const StepProgram& program, ParamId id) const override;
  Nanos staging(const StepProgram& program, ParamId id) const override;
  Nanos section_overhead(const StepProgram& program, SectionKind kind) const override;
  double compute_slowdown(const StepProgram& program) const override {
    return costs_.compute_slowdown(program);
  }
  HostBeside host_beside(const StepProgram& program) const override {
    return costs_.host_beside(program);
  }

 private:
  static constexpr Nanos kUnknown{-1};
  using ByParam = std::vector<Nanos>;

  // Empty until something of its kind is asked for.
  Nanos& of_param(ByParam& times, ParamId id) const {
    if (times.empty()) times.assign(params_, kUnknown);
    return times[index(id)];
  }
  template <typename Ask>
  static Nanos known(Nanos& time, Ask ask) {
    if (time == kUnknown) time = ask();
    return time;
  }

  const Estimator& costs_;
  size_t params_;
  mutable std::vector<Nanos> runs_;  // by region
  mutable std::array<ByParam, kOpCount> of_params_;
  mutable ByParam local_sums_, stagings_;
  mutable std::array<Nanos, kSectionKindCount> sections_;
  mutable Nanos norm_ = kUnknown;
};

}  // namespace deepcompile
