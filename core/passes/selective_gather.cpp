// SPDX-License-Identifier: Apache-2.0
#include "passes/selective_gather.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "ir/text.h"
#include "passes/gaps.h"
#include "passes/memory_use.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

// The step's memory, rising as gaps are closed.
class Budget {
 public:
  // A step without instructions has one point, which is never asked for.
  Budget(const MemoryTimeline& timeline, Bytes limit)
      : timeline_(timeline),
        limit_(limit),
        use_(at_least_one(bytes_during(std::span(timeline.points)))) {}

  // The first of the fullest points inside of the gap; none if nothing is inside.
  std::optional<size_t> fullest(const Gap& gap) const {
    std::optional<size_t> out;
    Bytes most;
    for (const auto& [first, last] : gap.inside(points())) {
      if (first >= last) continue;
      const Bytes here = use_.max(first, last);
      if (out && here <= most) continue;
      out = use_.first_above(first, last, here - Bytes{1});
      most = here;
    }
    return out;
  }
  Bytes free_at(size_t point) const { return limit_ - use_.at(point); }
  const MemoryAt& point(size_t at) const { return timeline_.points[at]; }
  size_t points() const { return timeline_.points.size(); }

  void take(const Gap& gap) {
    for (const auto& [first, last] : gap.inside(points())) use_.add(first, last, gap.bytes);
  }

 private:
  static std::vector<Bytes> at_least_one(std::vector<Bytes> bytes) {
    if (bytes.empty()) bytes.emplace_back();
    return bytes;
  }

  const MemoryTimeline& timeline_;
  Bytes limit_;
  MemoryUse use_;  // by point
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
                   bool explained) {
  Reasons reasons;
  for (size_t at : by_worth(gaps, budget.points())) {
    Gap* gap = &gaps[at];
    if (gap->saved <= least) continue;
    const auto fullest = budget.fullest(*gap);
    gap->closed = !fullest || gap->bytes <= budget.free_at(*fullest);
    if (gap->closed) budget.take(*gap);
    if (!explained) continue;
    const std::string numbers = pretty(gap->saved) + " of gathers a step for " + pretty(gap->bytes);
    if (gap->closed) {
      reasons.emplace_back(gap->id.param,
                           "kept whole " + place_of(program, *gap) + ": saves " + numbers);
    } else {
      reasons.emplace_back(
          gap->id.param, "not kept whole " + place_of(program, *gap) + ": would save " + numbers +
                             ", but only " + pretty(std::max(Bytes{0}, budget.free_at(*fullest))) +
                             " are free at " + point_name(program, budget.point(*fullest)));
    }
  }
  return reasons;
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

// Closes exactly the gaps that are named; names of gaps that are not there
// count for nothing.
void keep_these(StepProgram& program, std::vector<Gap>& gaps, std::vector<GapId> keep,
                PassContext& context) {
  std::sort(keep.begin(), keep.end());
  for (Gap& gap : gaps) {
    gap.closed = std::binary_search(keep.begin(), keep.end(), gap.id);
    if (!gap.closed || !context.environment().reasons) continue;
    context.because(gap.id.param, "kept whole " + place_of(program, gap) + ": saves " +
                                      pretty(gap.saved) + " of gathers a step for " +
                                      pretty(gap.bytes));
  }
  close_in(program, gaps);
}

}  // namespace

std::vector<GapId> gaps_worth_closing(const StepProgram& program,
                                      const PassEnvironment& environment,
                                      const SelectiveGatherOptions& options) {
  const MemoryTimeline timeline =
      timeline_within(program, environment.memory_budget, "selective_gather", options.timeline);
  std::vector<Gap> gaps = find_gaps(program, *environment.estimator);
  Budget budget(timeline, *environment.memory_budget - options.reserve);
  close_gaps(program, gaps, options.least_saving, budget, false);
  std::vector<GapId> out;
  for (const Gap& gap : gaps) {
    if (gap.closed) out.push_back(gap.id);
  }
  return out;
}

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
  std::vector<Gap> gaps = find_gaps(program, *environment.estimator);
  if (options_.keep) return keep_these(program, gaps, *options_.keep, context);
  const MemoryTimeline timeline =
      timeline_within(program, environment.memory_budget, name(), options_.timeline);
  Budget budget(timeline, *environment.memory_budget - options_.reserve);
  Reasons reasons = close_gaps(program, gaps, options_.least_saving, budget, environment.reasons);
  std::string step;
  if (environment.simulator == nullptr) {
    close_in(program, gaps);
  } else {
    SectionInstrs instrs = instrs_of(program);
    const Nanos before = environment.simulate(program).time;
    close_in(program, gaps);
    const Nanos after = environment.simulate(program).time;
    step = ", step " + pretty(before) + " -> " + pretty(after);
    if (after > before) {  // transfers that move may slow other kernels down
      replace_instrs(std::move(instrs), &program);
      context.because("undone: all releases stay, without them the simulated step is slower" +
                      step);
      return;
    }
  }
  if (!environment.reasons) return;
  for (auto& [param, text] : reasons) context.because(param, std::move(text));
  explain_step(gaps, program, *environment.memory_budget, step, context);
}

}  // namespace deepcompile
