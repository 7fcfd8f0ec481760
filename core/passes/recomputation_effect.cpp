// SPDX-License-Identifier: Apache-2.0
#include "passes/recomputation_effect.h"

#include <algorithm>
#include <utility>

#include "analysis/footprint.h"

namespace deepcompile {

Bytes RecomputationEffect::at(size_t place) const {
  Bytes out;
  for (const Range& range : ranges) {
    if (range.first <= place && place < range.last) out += range.bytes;
  }
  return out;
}

std::vector<Bytes> bytes_by_place(const MemoryTimeline& timeline) {
  std::vector<Bytes> out;
  Bytes before = timeline.base;
  for (const MemoryAt& point : timeline.points) {
    out.push_back(before);
    out.push_back(point.during);
    before = point.after;
  }
  out.push_back(before);
  return out;
}

EffectModel::EffectModel(const StepProgram& program, const RecomputableGraph& graph,
                         const StepClock& clock, const Estimator* estimator)
    : program_(program), graph_(graph), clock_(clock), whole_(program.params.size()) {
  for (RegionId id : graph.runs) {
    times_.push_back(time_of(program, estimator, {Op::kRun, std::nullopt, id, {}}));
  }
  const std::vector<Instr>& instrs = program.sections[graph.backward].instrs;
  for (size_t i = 0; i < instrs.size(); ++i) {
    if (instrs[i].op != Op::kGather && instrs[i].op != Op::kRelease) continue;
    gathered_ = true;
    std::vector<Whole>& spans = whole_[index(*instrs[i].param)];
    const bool open = !spans.empty() && spans.back().last == kNever;
    if (instrs[i].op == Op::kGather && !open) spans.push_back({i, kNever});
    if (instrs[i].op == Op::kRelease && open) spans.back().last = i;
  }
}

size_t EffectModel::forward_end(const ValueUse& value) const {
  const auto place = [&](size_t run) {
    return 2 * clock_.point(graph_.forward, graph_.instrs[run]) + 2;
  };
  if (!value.users.empty()) return place(value.users.back());
  return value.maker == kNever ? 2 * clock_.start(graph_.forward) : place(value.maker);
}

size_t EffectModel::end(const ValueUse& value) const {
  if (value.last_backward == kNever) return forward_end(value);
  return before(value.last_backward) + 2;
}

// What is made again is not there between; what is made again beside it is.
void EffectModel::outputs(size_t run, const Recomputation& plan, Ranges* out) const {
  const size_t place = plan.place[run];
  for (ValueId id : program_.region(graph_.runs[run]).outputs) {
    const ValueUse& value = graph_.values[index(id)];
    if (value.output) continue;
    const Bytes bytes = program_.value(id).bytes;
    const bool pinned = is_pinned(graph_, plan.again, id);
    if (!pinned && value.first_backward != kNever) {
      out->push_back({forward_end(value), before(place), Bytes{0} - bytes});
    }
    size_t needed = before(place) + 1;
    for (size_t user : value.users) {
      if (plan.again[user]) needed = std::max(needed, before(plan.place[user]) + 1);
    }
    const size_t from =
        value.last_backward == kNever ? before(place) : std::max(before(place), end(value));
    if (from < needed) out->push_back({from, needed, bytes});
  }
}

// What is not made again stays until it has been read.
void EffectModel::inputs(size_t run, const Recomputation& plan, Ranges* out) const {
  const size_t needed = before(plan.place[run]) + 1;
  for (const Operand& operand : program_.region(graph_.runs[run]).inputs) {
    const auto* id = std::get_if<ValueId>(&operand);
    if (id == nullptr) continue;
    const ValueUse& value = graph_.values[index(*id)];
    const bool made = value.maker != kNever && plan.again[value.maker] &&
                      graph_.block[value.maker] == graph_.block[run];
    if (value.output || (made && !is_pinned(graph_, plan.again, *id))) continue;
    if (end(value) < needed) out->push_back({end(value), needed, program_.value(*id).bytes});
  }
}

void EffectModel::parameters(size_t run, const Recomputation& plan, std::vector<ParamId>* seen,
                             Ranges* out) const {
  const size_t place = plan.place[run];
  for (const Operand& operand : program_.region(graph_.runs[run]).inputs) {
    const auto* ref = std::get_if<ParamRef>(&operand);
    if (ref == nullptr || !gathered_) continue;
    if (program_.param(ref->param).placement != Placement::kSharded) continue;
    if (std::find(seen->begin(), seen->end(), ref->param) != seen->end()) continue;
    seen->push_back(ref->param);
    size_t last = place;
    bool there = false;
    for (const Whole& span : whole_[index(ref->param)]) {
      there = there || (span.first < place && place < span.last);
      if (span.first < place) continue;
      if (span.first <= plan.until[graph_.block[run]]) last = span.first;
      break;
    }
    if (there) continue;
    out->push_back({before(place), before(last) + 1, footprint(program_, ref->param).gathered});
  }
}

RecomputationEffect EffectModel::effect(size_t block, const Recomputation& plan) const {
  RecomputationEffect out;
  std::vector<ParamId> seen;
  std::vector<std::pair<size_t, Bytes>> workspaces;  // by place, the largest of its chain
  for (size_t run = graph_.first_run[block]; run < graph_.first_run[block + 1]; ++run) {
    if (!plan.again[run]) continue;
    ++out.again;
    out.time += times_[run];
    outputs(run, plan, &out.ranges);
    inputs(run, plan, &out.ranges);
    parameters(run, plan, &seen, &out.ranges);
    const size_t place = before(plan.place[run]);
    const Bytes workspace = program_.region(graph_.runs[run]).workspace;
    auto at = std::find_if(workspaces.begin(), workspaces.end(),
                           [&](const auto& each) { return each.first == place; });
    if (at == workspaces.end()) at = workspaces.insert(at, {place, Bytes{0}});
    at->second = std::max(at->second, workspace);
  }
  for (const auto& [place, bytes] : workspaces) out.ranges.push_back({place, place + 1, bytes});
  return out;
}

}  // namespace deepcompile
