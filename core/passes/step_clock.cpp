// SPDX-License-Identifier: Apache-2.0
#include "passes/step_clock.h"

#include <algorithm>

#include "analysis/footprint.h"

namespace deepcompile {
namespace {

constexpr int64_t kRoughFlopsPerByte = 300;
constexpr int64_t kRoughBytesPerNano = 1000;
constexpr int64_t kRoughHostBytesPerNano = 25;

Bytes copied(const StepProgram& program, const Instr& instr) {
  Bytes bytes;
  for (ValueId id : instr.values) bytes += program.value(id).bytes;
  if (instr.param) bytes += footprint(program, *instr.param).states();
  return bytes;
}

}  // namespace

Nanos time_of(const StepProgram& program, const Estimator* estimator, const Instr& instr) {
  if (estimator != nullptr) return estimator->duration(program, instr);
  const Resource resource = traits(instr.op).resource;
  if (resource == Resource::kToHost || resource == Resource::kToDevice) {
    return {copied(program, instr).value / kRoughHostBytesPerNano};
  }
  if (instr.op != Op::kRun) return {0};
  const Region& region = program.region(*instr.region);
  if (region.time) return *region.time;
  return {std::max(region.flops / kRoughFlopsPerByte, region.moved.value) / kRoughBytesPerNano};
}

StepClock::StepClock(const StepProgram& program, const Estimator* estimator) {
  Nanos now;
  starts_.push_back(0);
  before_.push_back(now);
  for (const Section& section : program.sections) {
    starts_.push_back(starts_.back() + section.instrs.size());
    for (const Instr& instr : section.instrs) {
      if (traits(instr.op).resource == Resource::kCompute) {
        now += time_of(program, estimator, instr);
      }
      before_.push_back(now);
    }
  }
}

std::pair<size_t, size_t> StepClock::place(size_t point) const {
  const auto next = std::upper_bound(starts_.begin(), starts_.end() - 1, point);
  const auto section = static_cast<size_t>(next - starts_.begin()) - 1;
  return {section, point - starts_[section]};
}

size_t StepClock::first_at(Nanos time, size_t first, size_t last) const {
  const auto begin = before_.begin();
  const auto found = std::lower_bound(begin + static_cast<std::ptrdiff_t>(first),
                                      begin + static_cast<std::ptrdiff_t>(last), time);
  return static_cast<size_t>(found - begin);
}

size_t StepClock::last_at(Nanos time, size_t first, size_t last) const {
  const auto begin = before_.begin();
  const auto found = std::upper_bound(begin + static_cast<std::ptrdiff_t>(first),
                                      begin + static_cast<std::ptrdiff_t>(last) + 1, time);
  return std::max(static_cast<size_t>(found - begin), first + 1) - 1;
}

}  // namespace deepcompile
