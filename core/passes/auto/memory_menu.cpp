// SPDX-License-Identifier: Apache-2.0
#include "passes/auto/memory_menu.h"

#include <algorithm>
#include <map>
#include <utility>
#include <variant>

#include "analysis/footprint.h"
#include "base/lists.h"

namespace deepcompile {
namespace {

// Up to this many forward regions, each is weighed by itself; above, equal
// ones together.
constexpr size_t kSmall = 16;
// Up to this many groups, pairs are weighed too.
constexpr size_t kPairs = 16;
// Less than one part in so many of all that waits is a crumb.
constexpr int64_t kCrumb = 2000;
// Hints count this much more.
constexpr double kHint = 1.1;
// Times the mean size of the others, each weighed by its size.
constexpr double kUnusual = 2;

}  // namespace

MemoryMenu::MemoryMenu(const StepProgram& program, const Estimator& estimator)
    : program_(program), estimator_(estimator), graphs_(recomputable_graphs(program)) {
  add_up_compute();
  group_runs();
  find_units();
  find_states();
}

void MemoryMenu::add_up_compute() {
  for (const Section& section : program_.sections) {
    const bool once = section.kind == SectionKind::kUpdate;
    for (const Instr& instr : section.instrs) {
      if (traits(instr.op).resource != Resource::kCompute) continue;
      const Nanos time = estimator_.duration(program_, instr) * (once ? 1 : program_.accumulation);
      compute_ += time;
      if (section.kind == SectionKind::kForward) forward_compute_ += time;
    }
  }
}

void MemoryMenu::group_runs() {
  for (size_t g = 0; g < graphs_.size(); ++g) {
    for (size_t r = 0; r < graphs_[g].runs.size(); ++r) {
      const Instr instr{Op::kRun, std::nullopt, graphs_[g].runs[r], {}};
      runs_.push_back({g, r, 0, estimator_.duration(program_, instr) * program_.accumulation});
    }
  }
  std::map<std::pair<uint32_t, bool>, size_t> by_code;
  const bool small = runs_.size() <= kSmall;
  for (size_t i = 0; i < runs_.size(); ++i) {
    const bool allowed = graphs_[runs_[i].graph].allowed[runs_[i].run];
    size_t group = groups_.size();
    const std::pair code(program_.region(region(runs_[i])).code, allowed);
    if (!small) group = by_code.emplace(code, group).first->second;
    if (group == groups_.size()) {
      groups_.emplace_back();
      eligible_.push_back(allowed);
      group_time_.emplace_back();
    }
    runs_[i].group = group;
    groups_[group].push_back(i);
    group_time_[group] += runs_[i].time;
  }
}

MemoryMenu::ByRun MemoryMenu::none() const {
  ByRun out;
  for (const RecomputableGraph& graph : graphs_) out.emplace_back(graph.runs.size(), false);
  return out;
}

bool MemoryMenu::waits_in(size_t graph, const ByRun& again, ValueId id) const {
  const RecomputableGraph& in = graphs_[graph];
  const ValueUse& use = in.values[index(id)];
  if (use.output || use.maker == kNever) return false;
  const bool needed =
      use.first_backward != kNever || std::any_of(use.users.begin(), use.users.end(),
                                                  [&](size_t user) { return again[graph][user]; });
  return needed && (!again[graph][use.maker] || is_pinned(in, again[graph], id));
}

template <typename Visit>
void MemoryMenu::for_each_waiting(const ByRun& again, Visit visit) const {
  for (size_t g = 0; g < graphs_.size(); ++g) {
    const RecomputableGraph& graph = graphs_[g];
    for (size_t r = 0; r < graph.runs.size(); ++r) {
      for (ValueId id : program_.region(graph.runs[r]).outputs) {
        if (graph.values[index(id)].maker == r && waits_in(g, again, id)) visit(id);
      }
    }
  }
}

void MemoryMenu::find_touched() {
  touched_.resize(groups_.size());
  for (size_t g = 0; g < groups_.size(); ++g) {
    for (size_t at : groups_[g]) {
      const Run& run = runs_[at];
      const Region& made_by = program_.region(region(run));
      for (ValueId id : made_by.outputs) touched_[g].emplace_back(run.graph, id);
      for (const Operand& operand : made_by.inputs) {
        if (const auto* id = std::get_if<ValueId>(&operand))
          touched_[g].emplace_back(run.graph, *id);
      }
    }
    sort_unique(&touched_[g]);
  }
}

void MemoryMenu::mark(const std::vector<size_t>& groups, bool on, ByRun* again) const {
  for (size_t g : groups) {
    for (size_t at : groups_[g]) (*again)[runs_[at].graph][runs_[at].run] = on;
  }
}

// What it would be if these groups, none of which runs again yet, did.
MemoryMenu::Step MemoryMenu::weighed(const std::vector<size_t>& groups, ByRun* again) const {
  std::vector<std::pair<size_t, ValueId>> several;
  for (size_t i = 0; groups.size() > 1 && i < groups.size(); ++i) {
    several.insert(several.end(), touched_[groups[i]].begin(), touched_[groups[i]].end());
  }
  sort_unique(&several);
  const auto& touched = groups.size() == 1 ? touched_[groups.front()] : several;
  const auto waiting = [&] {
    Bytes total;
    for (const auto& [graph, id] : touched) {
      if (waits_in(graph, *again, id)) total += program_.value(id).bytes;
    }
    return total;
  };
  Nanos time{1};
  bool hinted = true;
  for (size_t g : groups) {
    time += group_time_[g];
    hinted = hinted && program_.region(region(runs_[groups_[g].front()])).checkpoint;
  }
  Step step{groups, waiting()};
  mark(groups, true, again);
  step.gain -= waiting();
  mark(groups, false, again);
  step.worth =
      static_cast<double>(step.gain.value) / static_cast<double>(time.value) * (hinted ? kHint : 1);
  return step;
}

// The groups that free most a nanosecond if they join.
MemoryMenu::Step MemoryMenu::best_step(const std::vector<bool>& taken, ByRun* again) const {
  std::vector<size_t> open;
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (eligible_[g] && !taken[g]) open.push_back(g);
  }
  Step best;
  const auto weigh = [&](const std::vector<size_t>& groups) {
    Step step = weighed(groups, again);
    if (step.gain > Bytes{0} && step.worth > best.worth) best = std::move(step);
  };
  for (size_t i = 0; i < open.size(); ++i) {
    weigh({open[i]});
    for (size_t j = i + 1; j < open.size() && groups_.size() <= kPairs; ++j) {
      weigh({open[i], open[j]});
    }
  }
  if (open.size() > 2) weigh(open);
  return best;
}

void MemoryMenu::find_units() {
  find_touched();
  std::vector<bool> taken(groups_.size(), false);
  ByRun again = none();
  while (true) {
    const Step step = best_step(taken, &again);
    if (step.groups.empty()) return;
    for (size_t g : step.groups) taken[g] = true;
    mark(step.groups, true, &again);
    add_units(step.groups, step.gain);
  }
}

// One unit an occurrence, if the groups occur equally often: a layer has one each.
void MemoryMenu::add_units(const std::vector<size_t>& groups, Bytes saved) {
  const size_t count = groups_[groups.front()].size();
  const bool paired = std::all_of(groups.begin(), groups.end(),
                                  [&](size_t g) { return groups_[g].size() == count; });
  const size_t units = paired ? count : 1;
  for (size_t u = 0; u < units; ++u) {
    RecomputeUnit unit;
    unit.saved = {saved.value / static_cast<int64_t>(units)};
    for (size_t g : groups) {
      for (size_t i = 0; i < groups_[g].size(); ++i) {
        if (paired && i != u) continue;
        unit.regions.push_back(region(runs_[groups_[g][i]]));
        unit.time += runs_[groups_[g][i]].time;
      }
    }
    recompute_.push_back(std::move(unit));
  }
}

void MemoryMenu::find_states() {
  std::vector<std::pair<size_t, uint32_t>> order;  // first use in a forward, parameter
  std::vector<size_t> first(program_.params.size(), SIZE_MAX);
  for (size_t i = 0; i < runs_.size(); ++i) {
    for (const Operand& operand : program_.region(region(runs_[i])).inputs) {
      const auto* ref = std::get_if<ParamRef>(&operand);
      if (ref != nullptr && first[index(ref->param)] == SIZE_MAX) first[index(ref->param)] = i;
    }
  }
  for (const Section& section : program_.sections) {
    for (const Instr& instr : section.instrs) {
      if (instr.op != Op::kUpdate) continue;
      order.emplace_back(first[index(*instr.param)], static_cast<uint32_t>(index(*instr.param)));
    }
  }
  std::sort(order.rbegin(), order.rend());
  for (const auto& [at, param] : order) {
    const ParamFootprint of = footprint(program_, ParamId{param});
    const Instr move{Op::kReloadStates, ParamId{param}, std::nullopt, {}};
    states_.push_back({param, of.master + of.moments, estimator_.duration(program_, move)});
  }
  put_unusual_last();
}

// A copy is one piece: what is unusually large hardly finds the room and the time for it.
void MemoryMenu::put_unusual_last() {
  double sum = 0, squares = 0;
  const auto size = [](const Movable& each) { return static_cast<double>(each.bytes.value); };
  for (const Movable& each : states_) {
    sum += size(each);
    squares += size(each) * size(each);
  }
  std::stable_partition(states_.begin(), states_.end(), [&](const Movable& each) {
    const double bytes = size(each);
    return bytes * (sum - bytes) <= kUnusual * (squares - bytes * bytes);
  });
}

Movable MemoryMenu::movable(ValueId id) const {
  const Instr move{Op::kReload, std::nullopt, std::nullopt, {id}};
  return {static_cast<uint32_t>(index(id)), program_.value(id).bytes,
          estimator_.duration(program_, move) * program_.accumulation};
}

std::vector<Movable> MemoryMenu::values(const std::vector<RegionId>& recompute, bool all) const {
  const std::vector<bool> named = marked(recompute, program_.regions.size());
  ByRun again = none();
  for (const Run& each : runs_) again[each.graph][each.run] = named[index(region(each))];
  std::vector<Movable> out;
  Bytes total;
  for_each_waiting(again, [&](ValueId id) {
    if (program_.value(id).bytes == Bytes{0}) return;
    out.push_back(movable(id));
    total += out.back().bytes;
  });
  if (all) return out;
  std::erase_if(out, [&](const Movable& each) { return each.bytes.value * kCrumb < total.value; });
  return out;
}

std::vector<bool> MemoryMenu::waits(const std::vector<RegionId>& recompute) const {
  std::vector<bool> out(program_.values.size(), false);
  const std::vector<Recomputation> plans = plan_recomputations(program_, graphs_, recompute);
  for (size_t g = 0; g < graphs_.size(); ++g) {
    const RecomputableGraph& graph = graphs_[g];
    const Recomputation& plan = plans[g];
    for (size_t r = 0; r < graph.runs.size(); ++r) {
      for (ValueId id : program_.region(graph.runs[r]).outputs) {
        const ValueUse& use = graph.values[index(id)];
        size_t needed = use.first_backward;
        for (size_t user : use.users) needed = std::min(needed, plan.place[user]);
        out[index(id)] = !use.output && needed < plan.place[r];
      }
    }
  }
  return out;
}

std::vector<bool> MemoryMenu::made_by(const std::vector<RegionId>& regions) const {
  std::vector<bool> out(program_.values.size(), false);
  for (RegionId region : regions) {
    for (ValueId id : program_.region(region).outputs) out[index(id)] = true;
  }
  return out;
}

std::vector<Movable> MemoryMenu::given(const std::vector<RegionId>& recompute) const {
  const std::vector<bool> waiting = waits(recompute), made = made_by(recompute);
  std::vector<Movable> out;
  for (size_t v = 0; v < waiting.size(); ++v) {
    const ValueId id{static_cast<uint32_t>(v)};
    if (waiting[v] && made[v] && program_.value(id).bytes > Bytes{0}) out.push_back(movable(id));
  }
  return out;
}

}  // namespace deepcompile
