// SPDX-License-Identifier: Apache-2.0
#include "passes/selective_gather.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "analysis/footprint.h"
#include "base/error.h"
#include "ir/text.h"

namespace deepcompile {
namespace {

// A point of the step: section and instruction, and their place in the
// timeline, which counts over all sections.
struct Point {
  size_t section = 0, instr = 0, at = 0;
};

// From a release to the next gather of the same parameter.
struct Gap {
  ParamId param{};
  Point release, gather;
  bool wraps = false;  // into the next micro batch or step
  Bytes bytes;         // held for its length if it is closed
  Nanos saved;         // of the link's time, a step
  bool closed = false;

  // The points strictly inside: [first, last) pairs.
  std::vector<std::pair<size_t, size_t>> inside(size_t points) const {
    if (!wraps) return {{release.at + 1, gather.at}};
    return {{0, gather.at}, {release.at + 1, points}};
  }
  size_t length(size_t points) const { return gather.at - release.at - 1 + (wraps ? points : 0); }
};

// All gaps whose gather would be saved, in the order of parameters and time.
class GapFinder {
 public:
  GapFinder(const StepProgram& program, const Estimator& estimator)
      : program_(program), estimator_(estimator), events_(program.params.size()) {
    size_t at = 0;
    for (size_t s = 0; s < program.sections.size(); ++s) {
      const auto& instrs = program.sections[s].instrs;
      for (size_t i = 0; i < instrs.size(); ++i, ++at) {
        if (instrs[i].op != Op::kGather && instrs[i].op != Op::kRelease) continue;
        events_[index(*instrs[i].param)].push_back({{s, i, at}, instrs[i].op});
      }
    }
  }

  std::vector<Gap> find() const {
    std::vector<Gap> gaps;
    for (size_t p = 0; p < events_.size(); ++p) {
      const ParamId id{static_cast<uint32_t>(p)};
      // A sharded parameter gathered in the update is gathered for that: leave it.
      if (program_.params[p].placement != Placement::kSharded || in_update(events_[p])) continue;
      for (size_t i = 0; i < events_[p].size(); ++i) {
        if (events_[p][i].op == Op::kRelease) add(id, i, &gaps);
      }
    }
    return gaps;
  }

 private:
  struct Event {
    Point point;
    Op op;
  };

  bool in_update(const std::vector<Event>& events) const {
    return std::any_of(events.begin(), events.end(), [&](const Event& event) {
      return program_.sections[event.point.section].kind == SectionKind::kUpdate;
    });
  }

  void add(ParamId id, size_t release, std::vector<Gap>* gaps) const {
    const std::vector<Event>& events = events_[index(id)];
    const auto is_gather = [](const Event& event) { return event.op == Op::kGather; };
    const auto from = events.begin() + static_cast<std::ptrdiff_t>(release);
    auto to = std::find_if(from, events.end(), is_gather);
    const bool wraps = to == events.end();
    if (wraps) to = std::find_if(events.begin(), events.end(), is_gather);
    const Instr& gather = program_.sections[to->point.section].instrs[to->point.instr];
    // How often a step passes the gap. After the last micro batch comes the
    // update, which makes trainable parameters stale.
    const bool stale = wraps && program_.param(id).trainable;
    const int64_t times = program_.accumulation - (stale ? 1 : 0);
    gaps->push_back({id, from->point, to->point, wraps, footprint(program_, id).gathered,
                     estimator_.duration(program_, gather) * times});
  }

  const StepProgram& program_;
  const Estimator& estimator_;
  std::vector<std::vector<Event>> events_;  // by parameter, in order
};

// The order in which gaps are tried: most time a byte, then the shortest, then
// parameters in order.
std::vector<Gap*> by_worth(std::vector<Gap>& gaps, size_t points) {
  const auto key = [&](const Gap& gap) {
    const double worth =
        static_cast<double>(gap.saved.value) / static_cast<double>(gap.bytes.value);
    return std::tuple(-worth, gap.length(points), gap.param, gap.release.at);
  };
  std::vector<Gap*> order;
  for (Gap& gap : gaps) order.push_back(&gap);
  std::sort(order.begin(), order.end(),
            [&](const Gap* a, const Gap* b) { return key(*a) < key(*b); });
  return order;
}

// The step's memory, rising as gaps are closed.
class Budget {
 public:
  Budget(const MemoryTimeline& timeline, Bytes limit) : timeline_(timeline), limit_(limit) {
    for (const MemoryAt& point : timeline.points) use_.push_back(point.during);
  }

  // The fullest point inside of the gap; none if nothing is inside.
  std::optional<size_t> fullest(const Gap& gap) const {
    std::optional<size_t> out;
    for (const auto& [first, last] : gap.inside(use_.size())) {
      for (size_t i = first; i < last; ++i) {
        if (!out || use_[i] > use_[*out]) out = i;
      }
    }
    return out;
  }
  Bytes free_at(size_t point) const { return limit_ - use_[point]; }
  const MemoryAt& point(size_t at) const { return timeline_.points[at]; }

  void take(const Gap& gap) {
    for (const auto& [first, last] : gap.inside(use_.size())) {
      for (size_t i = first; i < last; ++i) use_[i] += gap.bytes;
    }
  }

 private:
  const MemoryTimeline& timeline_;
  Bytes limit_;
  std::vector<Bytes> use_;  // by point
};

std::string place_of(const StepProgram& program, const Gap& gap) {
  const std::string from = section_name(program.sections[gap.release.section]);
  const std::string to = section_name(program.sections[gap.gather.section]);
  if (!gap.wraps) return from == to ? "in " + from : "from " + from + " to " + to;
  return "from " + from + " to " + to + " of the next " +
         (program.accumulation > 1 ? "micro batch" : "step");
}

using Reasons = std::vector<std::pair<ParamId, std::string>>;

// Closes what is worth it and fits. The reasons, one a gap.
Reasons close_gaps(const StepProgram& program, std::vector<Gap>& gaps, Nanos least, Budget& budget,
                   size_t points) {
  Reasons reasons;
  for (Gap* gap : by_worth(gaps, points)) {
    if (gap->saved <= least) continue;
    const auto fullest = budget.fullest(*gap);
    const std::string numbers = pretty(gap->saved) + " of gathers a step for " + pretty(gap->bytes);
    gap->closed = !fullest || gap->bytes <= budget.free_at(*fullest);
    if (gap->closed) {
      budget.take(*gap);
      reasons.emplace_back(gap->param,
                           "kept whole " + place_of(program, *gap) + ": saves " + numbers);
    } else {
      reasons.emplace_back(
          gap->param, "not kept whole " + place_of(program, *gap) + ": would save " + numbers +
                          ", but only " + pretty(std::max(Bytes{0}, budget.free_at(*fullest))) +
                          " are free at " + point_name(program, budget.point(*fullest)));
    }
  }
  return reasons;
}

// Without the closed gaps' releases, and without their gathers and waits if
// they are in the release's own section.
StepProgram without_gaps(const StepProgram& program, const std::vector<Gap>& gaps) {
  StepProgram out = program;
  std::vector<std::vector<bool>> drop;
  for (const Section& section : program.sections) drop.emplace_back(section.instrs.size(), false);
  for (const Gap& gap : gaps) {
    if (!gap.closed) continue;
    drop[gap.release.section][gap.release.instr] = true;
    if (gap.wraps || gap.gather.section != gap.release.section) continue;
    const auto& instrs = program.sections[gap.gather.section].instrs;
    drop[gap.gather.section][gap.gather.instr] = true;
    for (size_t i = gap.gather.instr; i < instrs.size(); ++i) {
      if (instrs[i].op != Op::kWait || instrs[i].param != gap.param) continue;
      drop[gap.gather.section][i] = true;
      break;
    }
  }
  for (size_t s = 0; s < out.sections.size(); ++s) {
    size_t i = 0;
    std::erase_if(out.sections[s].instrs, [&](const Instr&) { return drop[s][i++]; });
  }
  return out;
}

void explain_step(const std::vector<Gap>& gaps, const StepProgram& result, Bytes budget,
                  const std::string& step, PassContext& context) {
  const MemoryTimeline timeline = memory_timeline(result);
  DC_CHECK(timeline.peak <= budget, "selective_gather went over the memory budget");
  Nanos saved;
  size_t closed = 0;
  for (const Gap& gap : gaps) {
    if (!gap.closed) continue;
    saved += gap.saved;
    ++closed;
  }
  context.because("releases dropped: " + std::to_string(closed) + " of " +
                  std::to_string(gaps.size()) + ", " + pretty(saved) +
                  " of gathers saved a step; peak " + pretty(timeline.peak) + " of " +
                  pretty(budget) + step);
}

}  // namespace

Contract SelectiveGather::contract() const {
  return {.needs = {Fact::kGathersPlaced}};
}

void SelectiveGather::run(StepProgram& program, PassContext& context) const {
  const PassEnvironment& environment = context.environment();
  if (environment.estimator == nullptr || !environment.memory_budget) {
    throw UserError(
        "[passes] selective_gather: keeps parameters whole by the time it saves, up "
        "to a memory budget, and has no " +
        std::string(environment.estimator == nullptr ? "machine" : "memory budget") +
        ". Give it one.");
  }
  const MemoryTimeline timeline = timeline_within(program, environment.memory_budget, name());
  std::vector<Gap> gaps = GapFinder(program, *environment.estimator).find();
  Budget budget(timeline, *environment.memory_budget - options_.reserve);
  Reasons reasons =
      close_gaps(program, gaps, options_.least_saving, budget, timeline.points.size());
  const StepProgram result = without_gaps(program, gaps);
  std::string step;
  if (environment.simulate) {
    const Nanos before = environment.simulate(program).time;
    const Nanos after = environment.simulate(result).time;
    step = ", step " + pretty(before) + " -> " + pretty(after);
    if (after > before) {  // transfers that move may slow other kernels down
      context.because("undone: all releases stay, without them the simulated step is slower" +
                      step);
      return;
    }
  }
  for (auto& [param, text] : reasons) context.because(param, std::move(text));
  explain_step(gaps, result, *environment.memory_budget, step, context);
  for (size_t s = 0; s < result.sections.size(); ++s) {
    program.sections[s].instrs = result.sections[s].instrs;
  }
}

}  // namespace deepcompile
