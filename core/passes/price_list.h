// SPDX-License-Identifier: Apache-2.0
// What each instruction of one program would take, as a table: an Estimator
// that can be written down and read elsewhere, whatever machine or measurement
// its numbers come from. Passes in shared libraries get one.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "cost/cost_model.h"
#include "ir/program.h"

namespace deepcompile {

class PriceList final : public Estimator {
 public:
  // Prices of every instruction that could be written with `program`'s tables.
  PriceList(const StepProgram& program, const Estimator& estimator);

  // Reads what json() wrote. Throws UserError, which begins with `where`.
  PriceList(std::string_view json, const std::string& where);
  std::string json() const;

  // Of the program that the list was made for, or one with the same tables. Instructions
  // on several values take the sum.
  Nanos duration(const StepProgram& program, const Instr& instr) const override;
  Nanos local_sum(const StepProgram& program, ParamId id) const override;
  Nanos staging(const StepProgram& program, ParamId id) const override;
  Nanos section_overhead(const StepProgram& program, SectionKind kind) const override;
  double compute_slowdown(const StepProgram& program) const override;
  HostBeside host_beside(const StepProgram& program) const override;

 private:
  using ByOp = std::array<std::vector<int64_t>, kOpCount>;  // ns, by position in a table

  ByOp params_, regions_, values_;
  std::array<int64_t, kOpCount> alone_{};  // instructions without operands
  std::vector<int64_t> local_sums_, stagings_;
  std::vector<int64_t> sections_;  // by kind
  double slowdown_ = 1;
  HostBeside beside_;
};

}  // namespace deepcompile
