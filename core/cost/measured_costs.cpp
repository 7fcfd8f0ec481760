// SPDX-License-Identifier: Apache-2.0
#include "cost/measured_costs.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "analysis/footprint.h"
#include "base/error.h"

namespace deepcompile {

MeasuredCosts::MeasuredCosts(Machine machine, CostTable table)
    : MachineCosts(std::move(machine)), table_(std::move(table)) {
  std::vector<Nanos> overheads = {table_.run_overhead.value_or(Nanos{})};
  for (const auto& each : table_.section_overhead) overheads.push_back(each.value_or(Nanos{}));
  for (const Nanos each : overheads) {
    if (each >= Nanos{} && each <= kLongestTime) continue;
    throw UserError("[cost] cost table: an overhead is " + std::to_string(each.value) +
                    " ns. Give one from 0 to " + std::to_string(kLongestTime.value) + ".");
  }
}

void MeasuredCosts::check(const StepProgram& program) const {
  if (program.world == table_.world) return;
  throw UserError("[cost] cost table: was measured with " + std::to_string(table_.world) +
                  " ranks, the program is for " + std::to_string(program.world) +
                  ". Measure with as many, or use the machine description alone.");
}

Nanos MeasuredCosts::duration(const StepProgram& program, const Instr& instr) const {
  check(program);
  const std::optional<Nanos> time = measured(program, instr);
  return time ? *time : MachineCosts::duration(program, instr);
}

Nanos MeasuredCosts::staging(const StepProgram& program, ParamId id) const {
  check(program);
  const std::optional<Nanos> time = at(CurveKind::kStaging, footprint(program, id).reduction_input);
  return time ? *time : MachineCosts::staging(program, id);
}

Nanos MeasuredCosts::section_overhead(const StepProgram& program, SectionKind kind) const {
  check(program);
  return table_.section_overhead[static_cast<size_t>(kind)].value_or(Nanos{});
}

double MeasuredCosts::compute_slowdown(const StepProgram& program) const {
  check(program);
  if (program.world > 1 && table_.compute_slowdown) return *table_.compute_slowdown;
  return MachineCosts::compute_slowdown(program);
}

HostBeside MeasuredCosts::host_beside(const StepProgram& program) const {
  check(program);
  const HostBeside other = MachineCosts::host_beside(program);
  return {table_.to_device_beside.value_or(other.to_device),
          table_.to_host_beside.value_or(other.to_host)};
}

std::optional<Nanos> MeasuredCosts::measured(const StepProgram& program, const Instr& instr) const {
  switch (instr.op) {
    case Op::kRun:
      return run_time(program.region(*instr.region));
    case Op::kGather: {
      if (program.world == 1) return std::nullopt;
      const bool rows = program.rows_read(*instr.param) > 0;  // a reduce-scatter
      return at(rows ? CurveKind::kReduce : CurveKind::kGather, program.gather_bytes(*instr.param));
    }
    case Op::kReduce:
      return reduce_time(program, *instr.param);
    case Op::kAccumulate:
      return at(CurveKind::kAccumulate, footprint(program, *instr.param).reduction_result);
    case Op::kNorm:
      return at(CurveKind::kNorm, norm_bytes(program));
    case Op::kUpdate: {
      const bool all = program.param(*instr.param).placement == Placement::kReplicated;
      return at(CurveKind::kUpdate,
                all ? program.full_bytes(*instr.param) : program.shard_bytes(*instr.param));
    }
    case Op::kOffloadStates:
      return states_time(CurveKind::kToHost, program, *instr.param);
    case Op::kReloadStates:
      return states_time(CurveKind::kToDevice, program, *instr.param);
    case Op::kOffload:
      return values_time(CurveKind::kToHost, program, instr);
    case Op::kReload:
      return values_time(CurveKind::kToDevice, program, instr);
    default:
      return std::nullopt;
  }
}

std::optional<Nanos> MeasuredCosts::run_time(const Region& region) const {
  if (!region.time) return std::nullopt;
  return *region.time + table_.run_overhead.value_or(Nanos{0});
}

// A replicated parameter's gradient comes back whole: a gather after it.
std::optional<Nanos> MeasuredCosts::reduce_time(const StepProgram& program, ParamId id) const {
  if (program.world == 1) return std::nullopt;
  const Bytes whole = program.reduce_bytes(id);
  if (program.rows_read(id) > 0) return at(CurveKind::kGather, whole);
  const std::optional<Nanos> scatter = at(CurveKind::kReduce, whole);
  if (program.param(id).placement != Placement::kReplicated) return scatter;
  const std::optional<Nanos> gather = at(CurveKind::kGather, whole);
  if (!scatter || !gather) return std::nullopt;
  return *scatter + *gather;
}

// Both moments, and the master copy if there is one, each a tensor.
std::optional<Nanos> MeasuredCosts::states_time(CurveKind kind, const StepProgram& program,
                                                ParamId id) const {
  const ParamFootprint of = footprint(program, id);
  std::optional<Nanos> time = at(kind, Bytes{of.moments.value / 2});
  if (!time) return std::nullopt;
  *time = *time * 2;
  if (of.master.value > 0) *time += *at(kind, of.master);
  return time;
}

std::optional<Nanos> MeasuredCosts::values_time(CurveKind kind, const StepProgram& program,
                                                const Instr& instr) const {
  if (table_.curve(kind).empty()) return std::nullopt;
  Nanos time;
  for (ValueId id : instr.values) {
    time = std::min(kLongestStep, time + table_.curve(kind).at(program.value(id).bytes));
  }
  return time;
}

std::optional<Nanos> MeasuredCosts::at(CurveKind kind, Bytes bytes) const {
  const Curve& curve = table_.curve(kind);
  if (curve.empty()) return std::nullopt;
  return curve.at(bytes);
}

}  // namespace deepcompile
