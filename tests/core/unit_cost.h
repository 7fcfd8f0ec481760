// SPDX-License-Identifier: Apache-2.0
// A machine on which expected times can be worked out by hand: the link moves
// 1 byte a ns whatever the number of ranks, as does each direction of the host
// link, regions take their stated time, and the rest has fixed costs.
#pragma once

#include "analysis/footprint.h"
#include "cost/cost_model.h"

namespace deepcompile {

class UnitCost final : public Estimator {
 public:
  Nanos accumulate{10};
  Nanos norm{20};
  Nanos update{50};
  Nanos sum{15};     // of a rank's own gradients
  Nanos copy{0};     // of a gradient into its reduction's buffer
  Nanos between{0};  // sections
  double slowdown = 1;
  int64_t host_rate = 1;  // bytes a ns, to the host and back
  HostBeside beside;

  Nanos duration(const StepProgram& program, const Instr& instr) const override {
    switch (instr.op) {
      case Op::kRun:
        return program.region(*instr.region).time.value_or(Nanos{0});
      case Op::kGather:
        return {program.full_bytes(*instr.param).value};
      case Op::kReduce:
        return {footprint(program, *instr.param).reduction_input.value};
      case Op::kAccumulate:
        return accumulate;
      case Op::kNorm:
        return norm;
      case Op::kUpdate:
        return update;
      case Op::kOffloadStates:
      case Op::kReloadStates:
        return {footprint(program, *instr.param).states().value / host_rate};
      case Op::kOffload:
      case Op::kReload: {
        Nanos time;
        for (ValueId id : instr.values) time += Nanos{program.value(id).bytes.value};
        return {time.value / host_rate};
      }
      default:
        return {0};
    }
  }
  Nanos local_sum(const StepProgram&, ParamId) const override { return sum; }
  Nanos staging(const StepProgram&, ParamId) const override { return copy; }
  Nanos section_overhead(const StepProgram&, SectionKind) const override { return between; }
  double compute_slowdown(const StepProgram&) const override { return slowdown; }
  HostBeside host_beside(const StepProgram&) const override { return beside; }
};

}  // namespace deepcompile
