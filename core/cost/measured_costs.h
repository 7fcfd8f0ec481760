// SPDX-License-Identifier: Apache-2.0
// MeasuredCosts: an Estimator that goes by measurements (a CostTable; regions
// carry their own times in the program) and asks the machine description for
// what was not measured.
#pragma once

#include <utility>

#include "cost/cost_model.h"
#include "cost/cost_table.h"

namespace deepcompile {

class MeasuredCosts final : public MachineCosts {
 public:
  // Keeps its own copies. Throws UserError for an overhead that nothing has.
  MeasuredCosts(Machine machine, CostTable table);

  // All throw UserError if the program is for other than the table's ranks.
  Nanos duration(const StepProgram& program, const Instr& instr) const override;
  Nanos staging(const StepProgram& program, ParamId id) const override;
  Nanos section_overhead(const StepProgram& program, SectionKind kind) const override;
  double compute_slowdown(const StepProgram& program) const override;
  HostBeside host_beside(const StepProgram& program) const override;

  const CostTable& table() const { return table_; }

 private:
  void check(const StepProgram& program) const;
  std::optional<Nanos> measured(const StepProgram& program, const Instr& instr) const;
  std::optional<Nanos> run_time(const Region& region) const;
  std::optional<Nanos> reduce_time(const StepProgram& program, ParamId id) const;
  std::optional<Nanos> states_time(CurveKind kind, const StepProgram& program, ParamId id) const;
  std::optional<Nanos> values_time(CurveKind kind, const StepProgram& program,
                                   const Instr& instr) const;
  std::optional<Nanos> at(CurveKind kind, Bytes bytes) const;

  CostTable table_;
};

}  // namespace deepcompile
