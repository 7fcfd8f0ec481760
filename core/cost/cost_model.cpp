// SPDX-License-Identifier: Apache-2.0
#include "cost/cost_model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

#include "analysis/footprint.h"
#include "base/error.h"

namespace deepcompile {
namespace {

constexpr double kNanosPerSecond = 1e9;

// By the machine's figure `part`.`key`.
Nanos from_seconds(double seconds, const Machine& machine, std::string_view part,
                   std::string_view key) {
  if (!(seconds * kNanosPerSecond < static_cast<double>(kLongestTime.value))) {
    throw UserError("[cost] " + machine.name + ": " + std::string(part) + "." + std::string(key) +
                    ": something takes more than a day by it. Correct it: it is bytes or "
                    "operations a second, as in 319e9.");
  }
  return {static_cast<int64_t>(std::ceil(seconds * kNanosPerSecond - 1e-6))};
}

double to_double(Bytes bytes) {
  return static_cast<double>(bytes.value);
}

// The element type whose rate a region runs at: that of its first parameter,
// else the one that most of the program's parameter elements have.
DType compute_dtype(const StepProgram& program, const Region& region) {
  for (const Operand& operand : region.inputs) {
    if (const auto* ref = std::get_if<ParamRef>(&operand)) return program.param(ref->param).dtype;
  }
  std::array<int64_t, 4> numel{};
  for (const Param& param : program.params) numel[static_cast<size_t>(param.dtype)] += param.numel;
  return static_cast<DType>(std::max_element(numel.begin(), numel.end()) - numel.begin());
}

double flops_rate(const Machine& machine, DType dtype) {
  const auto found = machine.device.flops.find(dtype);
  if (found == machine.device.flops.end()) {
    throw UserError("[cost] " + machine.name + ": device.flops has no rate for " +
                    std::string(to_string(dtype)) + ", which the program computes in. Add it.");
  }
  return found->second * machine.device.compute_efficiency;
}

}  // namespace

Layout layout(const Machine& machine, int64_t world) {
  if (world > machine.ranks()) {
    throw UserError("[cost] " + machine.name + ": has " + std::to_string(machine.ranks()) +
                    " ranks, the program is for " + std::to_string(world) +
                    ". Choose fewer ranks or a larger machine.");
  }
  Layout result{1, std::min(world, machine.ranks_per_node)};
  if (world % result.ranks_per_node != 0) {
    throw UserError("[cost] " + machine.name + ": " + std::to_string(world) +
                    " ranks do not fill whole nodes of " + std::to_string(result.ranks_per_node) +
                    ". Choose a multiple of " + std::to_string(result.ranks_per_node) + ".");
  }
  result.nodes = world / result.ranks_per_node;
  return result;
}

Nanos collective_time(const Machine& machine, Collective kind, int64_t world, Bytes whole) {
  const auto [nodes, ranks] = layout(machine, world);
  const bool gather = kind == Collective::kAllGather;
  const auto transfer = [&](const Link& link, double bytes, std::string_view part) {
    return from_seconds(bytes / (gather ? link.gather_bandwidth : link.reduce_bandwidth), machine,
                        part, gather ? "gather_bandwidth" : "reduce_bandwidth");
  };
  const double n = static_cast<double>(nodes), g = static_cast<double>(ranks);
  Nanos time = machine.intra.latency * (ranks - 1);
  Nanos moving = transfer(machine.intra, to_double(whole) * (g - 1) / g, "links.intra");
  if (nodes > 1) {
    time += machine.inter->latency * (nodes - 1);
    const double between = to_double(whole) * (n - 1) / (n * g);
    moving = std::max(moving, transfer(*machine.inter, between, "links.inter"));
  }
  return time + moving;
}

Bytes norm_bytes(const StepProgram& program) {
  Bytes bytes;
  for (size_t i = 0; i < program.params.size(); ++i) {
    const Bytes gradient = footprint(program, ParamId{static_cast<uint32_t>(i)}).gradient;
    const bool whole = program.params[i].placement == Placement::kReplicated;
    bytes += whole ? Bytes{gradient.value / program.world} : gradient;
  }
  return bytes;
}

double MachineCosts::compute_slowdown(const StepProgram& program) const {
  const Layout ranks = layout(machine_, program.world);
  if (program.world == 1) return 1;
  const double inter = ranks.nodes > 1 ? machine_.inter->compute_slowdown : 1;
  return std::max(machine_.intra.compute_slowdown, inter);
}

Nanos MachineCosts::memory_time(double bytes) const {
  const Device& device = machine_.device;
  return from_seconds(bytes / (device.memory_bandwidth * device.memory_efficiency), machine_,
                      "device", "memory_bandwidth") +
         device.launch_overhead;
}

Nanos MachineCosts::roofline(const StepProgram& program, const Region& region) const {
  const Device& device = machine_.device;
  Nanos time = memory_time(to_double(region.moved));
  if (region.flops > 0) {
    const double rate = flops_rate(machine_, compute_dtype(program, region));
    const double seconds = static_cast<double>(region.flops) / rate;
    time =
        std::max(time, from_seconds(seconds, machine_, "device", "flops") + device.launch_overhead);
  }
  return time;
}

// Every owner sends what it owns of the rows that all ranks number: a sum with zeros.
Nanos MachineCosts::gather_time(const StepProgram& program, ParamId id) const {
  const int64_t rows = program.rows_read(id), world = program.world;
  const Bytes moved = program.gather_bytes(id);
  if (rows == 0) return collective_time(machine_, Collective::kAllGather, world, moved);
  const Bytes numbers{world * rows * kRowNumberBytes};
  return collective_time(machine_, Collective::kAllGather, world, numbers) +
         collective_time(machine_, Collective::kReduceScatter, world, moved);
}

Nanos MachineCosts::reduce_time(const StepProgram& program, ParamId id) const {
  const Bytes whole = program.reduce_bytes(id);
  if (program.rows_read(id) > 0) {
    return collective_time(machine_, Collective::kAllGather, program.world, whole);
  }
  Nanos time = collective_time(machine_, Collective::kReduceScatter, program.world, whole);
  if (program.param(id).placement == Placement::kReplicated) {
    time += collective_time(machine_, Collective::kAllGather, program.world, whole);
  }
  return time;
}

// With one micro batch the reduction's buffer becomes the gradient and is only scaled to the mean;
// with more, result and sum are read and the sum is written, or written alone if it is the only
// one.
Nanos MachineCosts::accumulate_time(const StepProgram& program, ParamId id) const {
  const ParamFootprint of = footprint(program, id);
  const Bytes sum = of.reduction_result + of.gradient * (program.boundary ? 1 : 2);
  const Bytes rows = program.rows_read(id) > 0 ? of.reduction_input : Bytes{};
  return memory_time(to_double(rows + (program.accumulation == 1 ? of.reduction_result * 2 : sum)));
}

Nanos MachineCosts::local_sum(const StepProgram& program, ParamId id) const {
  const ParamFootprint of = footprint(program, id);
  return memory_time(to_double(of.reduction_input + of.local_sum * 2));
}

Nanos MachineCosts::staging(const StepProgram& program, ParamId id) const {
  const auto more = static_cast<int64_t>(program.param(id).members.size()) - 1;
  const Bytes written = footprint(program, id).reduction_input;
  const bool rows = program.rows_read(id) > 0;
  return memory_time(to_double(written + (rows ? written : program.full_bytes(id)))) +
         machine_.device.launch_overhead * std::max<int64_t>(0, more);
}

// Reads this rank's piece of every gradient; one small all-reduce.
Nanos MachineCosts::norm_time(const StepProgram& program) const {
  Nanos time = memory_time(to_double(norm_bytes(program)));
  const Bytes sum{element_size(DType::kF32)};
  for (Collective kind : {Collective::kReduceScatter, Collective::kAllGather}) {
    time += collective_time(machine_, kind, program.world, sum);
  }
  return time;
}

// AdamW reads the gradient, reads and writes both moments and the master copy,
// and writes the weights; without a master copy it reads and writes the weights.
Nanos MachineCosts::update_time(const StepProgram& program, ParamId id) const {
  const ParamFootprint of = footprint(program, id);
  const bool all = program.param(id).placement == Placement::kReplicated;
  const Bytes weights = all ? of.weights : program.shard_bytes(id);
  const Bytes values = of.master.value > 0 ? of.master * 2 + weights : weights * 2;
  return memory_time(to_double(of.gradient + of.moments * 2 + values));
}

Nanos MachineCosts::host_time(bool to_host, Bytes bytes, int64_t tensors) const {
  const HostLink& host = machine_.host;
  const double bandwidth = to_host ? host.to_host_bandwidth : host.to_device_bandwidth;
  const std::string_view key = to_host ? "to_host_bandwidth" : "to_device_bandwidth";
  return from_seconds(to_double(bytes) / bandwidth, machine_, "host", key) +
         machine_.device.launch_overhead * tensors;
}

// Both moments, and the master copy if there is one.
Nanos MachineCosts::states_time(const StepProgram& program, const Instr& instr) const {
  const ParamFootprint of = footprint(program, *instr.param);
  return host_time(instr.op == Op::kOffloadStates, of.states(), of.master.value > 0 ? 3 : 2);
}

Nanos MachineCosts::values_time(const StepProgram& program, const Instr& instr) const {
  Bytes bytes;
  for (ValueId id : instr.values) bytes += program.value(id).bytes;
  return host_time(instr.op == Op::kOffload, bytes, static_cast<int64_t>(instr.values.size()));
}

Nanos MachineCosts::duration(const StepProgram& program, const Instr& instr) const {
  switch (instr.op) {
    case Op::kRun: {
      const Region& region = program.region(*instr.region);
      return region.time ? *region.time : roofline(program, region);
    }
    case Op::kGather:
      return gather_time(program, *instr.param);
    case Op::kReduce:
      return reduce_time(program, *instr.param);
    case Op::kAccumulate:
      return accumulate_time(program, *instr.param);
    case Op::kNorm:
      return norm_time(program);
    case Op::kUpdate:
      return update_time(program, *instr.param);
    case Op::kOffloadStates:
    case Op::kReloadStates:
      return states_time(program, instr);
    case Op::kOffload:
    case Op::kReload:
      return values_time(program, instr);
    case Op::kWait:
    case Op::kRelease:
    case Op::kDefer:
    case Op::kEvictStates:
    case Op::kAwaitStates:
    case Op::kEvict:
    case Op::kAwait:
      return {0};
  }
  DC_CHECK(false, "an instruction without a cost");
}

int fill_analytic_times(StepProgram& program, const Machine& machine) {
  layout(machine, program.world);
  const MachineCosts costs(machine);
  int filled = 0;
  for (Region& region : program.regions) {
    if (region.time) continue;
    region.time = costs.roofline(program, region);
    ++filled;
  }
  return filled;
}

}  // namespace deepcompile
