// SPDX-License-Identifier: Apache-2.0
#include "passes/prefetch.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>

#include "analysis/footprint.h"
#include "base/error.h"
#include "ir/text.h"
#include "passes/memory_use.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

constexpr Bytes kUnmoved{-1};  // the limit that leaves a section as it is
// Fractions of the largest limit to try: enough is often much less.
constexpr int kRefinements = 4;  // of the largest limit, each halving its error
constexpr std::array<int64_t, 5> kFractions = {1, 2, 4, 16, 64};

using Slots = std::vector<size_t>;

// The gathers of one section and where they may go. Places are slots: slot k
// is just before instruction k of the section as it was.
class SectionGathers {
 public:
  SectionGathers(const StepProgram& program, const Section& section, const MemoryAt* points,
                 std::optional<Bytes> budget, bool any_order)
      : section_(section), points_(points), budget_(budget), any_order_(any_order) {
    std::vector<size_t> after(program.params.size(), 0);  // by parameter: the earliest slot
    for (size_t i = 0; i < section.instrs.size(); ++i) {
      const Instr& instr = section.instrs[i];
      const bool buffer = instr.op == Op::kGather || instr.op == Op::kWait ||
                          instr.op == Op::kRelease || instr.op == Op::kUpdate ||
                          instr.op == Op::kDefer;
      if (!buffer) continue;
      size_t& earliest = after[index(*instr.param)];
      if (instr.op == Op::kGather) {
        const Bytes bytes = footprint(program, *instr.param).gathered;
        gathers_.push_back({i, earliest, bytes, i == 0 ? Bytes{} : grows(i)});
        total_ += bytes;
      }
      earliest = i + 1;
    }
    if (budget && !gathers_.empty()) use_.emplace(bytes_during({points, section.instrs.size()}));
    latest_.assign(section.instrs.size() + 1, section.instrs.size());
    for (size_t i = section.instrs.size(); i-- > 0;) {
      const Op op = section.instrs[i].op;
      latest_[i] = traits(op).is_collective && op != Op::kGather ? i : latest_[i + 1];
    }
  }

  // The slot of each gather, in order, under a limit. A gather that does not
  // fit into the budget at once waits until it does, but not until after the
  // next reduction: that would be another order. Nothing if it would have to.
  std::optional<Slots> slots(Bytes limit) const {
    std::optional<MemoryUse> use = use_;
    Slots out;
    out.reserve(gathers_.size());
    Bytes window;      // of gathers `first` to the present one
    size_t first = 0;  // the earliest that is not at its place when this one is issued
    size_t wanted = 0, previous = 0;
    for (size_t i = 0; i < gathers_.size(); ++i) {
      const Gather& each = gathers_[i];
      window += each.bytes;
      for (; window > limit && first <= i; ++first) window -= gathers_[first].bytes;
      const size_t reach = first == 0 ? 0 : gathers_[first - 1].at + 1;
      wanted = std::min(each.at, std::max({reach, each.earliest, wanted}));
      const size_t slot = first_fit(each, std::max(wanted, previous), use);
      const size_t last = any_order_ ? each.at : std::min(each.at, latest_[wanted]);
      if (slot > last) return std::nullopt;
      out.push_back(previous = slot);
    }
    return out;
  }

  // The largest limit up to `ahead` whose order fits into the budget, within
  // a few percent.
  Bytes largest(Bytes ahead) const {
    Bytes high = std::min(ahead, total_);
    if (slots(high)) return high;
    Bytes low = high;
    while (low > Bytes{0} && !slots(low)) {
      high = low;
      low = {low.value / 2};
    }
    if (!slots(low)) return kUnmoved;
    for (int i = 0; i < kRefinements && high - low > Bytes{1}; ++i) {
      const Bytes middle{low.value + (high.value - low.value) / 2};
      (slots(middle) ? low : high) = middle;
    }
    return low;
  }

  std::vector<Instr> moved(const Slots& slots) const {
    std::vector<Instr> out;
    out.reserve(section_.instrs.size());
    size_t next = 0;  // slots never fall
    for (size_t i = 0; i < section_.instrs.size(); ++i) {
      for (; next < slots.size() && slots[next] == i; ++next) {
        out.push_back(section_.instrs[gathers_[next].at]);
      }
      if (section_.instrs[i].op != Op::kGather) out.push_back(section_.instrs[i]);
    }
    return out;
  }

  // Calls visit(instruction of the gather, slot) for each that moves.
  template <typename Visit>
  void for_each_moved(const Slots& slots, Visit visit) const {
    for (size_t i = 0; i < gathers_.size(); ++i) {
      if (slots[i] < gathers_[i].at) visit(gathers_[i].at, slots[i]);
    }
  }

 private:
  struct Gather {
    size_t at = 0;        // its instruction
    size_t earliest = 0;  // the slot after the last instruction on its parameter's buffer
    Bytes bytes;          // of the full buffer
    Bytes grows;          // what it adds: nothing if the buffer is there already
  };

  Bytes grows(size_t at) const { return points_[at].during - points_[at - 1].after; }

  // The first slot from `wanted` on from which the gather fits; takes its bytes.
  size_t first_fit(const Gather& each, size_t wanted, std::optional<MemoryUse>& use) const {
    if (!use || each.grows == Bytes{0}) return wanted;
    const auto full = use->last_above(wanted, each.at, *budget_ - each.grows);
    const size_t slot = full ? *full + 1 : wanted;
    use->add(slot, each.at, each.grows);
    return slot;
  }

  const Section& section_;
  const MemoryAt* points_;  // one an instruction of the section
  std::optional<Bytes> budget_;
  bool any_order_;
  std::vector<Gather> gathers_;
  std::optional<MemoryUse> use_;  // by instruction; nothing without a budget
  std::vector<size_t> latest_;    // by slot: the last before the next reduction or norm
  Bytes total_;
};

using Limits = std::vector<Bytes>;  // one a section

class Planner {
 public:
  Planner(const StepProgram& program, const PassEnvironment& environment,
          const PrefetchOptions& options)
      : program_(program),
        environment_(environment),
        options_(options),
        timeline_(
            timeline_within(program, environment_.memory_budget, "prefetch", options.timeline)) {
    DC_CHECK(options.most.empty() || options.most.size() == program.sections.size(),
             "prefetch takes one limit a section");
    size_t at = 0;
    for (const Section& section : program_.sections) {
      sections_.emplace_back(program_, section, timeline_.points.data() + at,
                             environment_.memory_budget, options.any_order);
      at += section.instrs.size();
    }
  }

  const SectionGathers& section(size_t at) const { return sections_[at]; }
  std::optional<Nanos> before() const { return before_; }
  std::optional<Nanos> best() const { return best_; }

  Limits choose() { return environment_.simulator != nullptr ? fastest(largest()) : largest(); }

  Limits largest() const {
    Limits limits;
    for (size_t s = 0; s < sections_.size(); ++s) {
      const Bytes ahead = options_.most.empty() ? options_.ahead : options_.most[s];
      limits.push_back(ahead < Bytes{0} ? kUnmoved : sections_[s].largest(ahead));
    }
    return limits;
  }

  // `agreed`, checked against the program and the budget.
  Limits agreed() const {
    if (options_.agreed.size() != sections_.size()) {
      throw UserError("[passes] prefetch: " + std::to_string(options_.agreed.size()) +
                      " agreed limits for " + std::to_string(sections_.size()) +
                      " sections. Give one a section.");
    }
    for (size_t s = 0; s < sections_.size(); ++s) {
      if (sections_[s].slots(options_.agreed[s])) continue;
      throw UserError("[passes] prefetch: the agreed limit of " + pretty(options_.agreed[s]) +
                      " takes " + section_name(program_.sections[s]) +
                      " above the memory budget of " + pretty(*environment_.memory_budget) +
                      ". Agree on a smaller limit, or raise the budget.");
    }
    return options_.agreed;
  }

  std::vector<std::vector<Instr>> apply(const Limits& limits) const {
    std::vector<std::vector<Instr>> out;
    for (size_t s = 0; s < sections_.size(); ++s) {
      out.push_back(sections_[s].moved(*sections_[s].slots(limits[s])));
    }
    return out;
  }

 private:
  bool moves(size_t s, Bytes limit) const {
    bool any = false;
    sections_[s].for_each_moved(*sections_[s].slots(limit), [&](size_t, size_t) { any = true; });
    return any;
  }

  // Tries limits; keeps them if the step is faster, or as fast and `prefer`.
  void attempt(Limits* best, const Limits& limits, bool prefer) {
    if (simulated_ >= options_.simulations) return;
    ++simulated_;
    if (!trial_) trial_ = program_;
    std::vector<std::vector<Instr>> instrs = apply(limits);
    replace_instrs(std::move(instrs), &*trial_);
    const Nanos time = environment_.simulate(*trial_).time;
    if (best_ && (time > *best_ || (time == *best_ && !prefer))) return;
    best_ = time;
    *best = limits;
  }

  Limits fastest(const Limits& largest) {
    const Limits unmoved(largest.size(), kUnmoved);
    Limits best = unmoved;
    before_ = best_ = environment_.simulate(program_).time;
    for (int64_t part : kFractions) {
      Limits limits = largest;
      for (size_t s = 0; s < limits.size(); ++s) {
        if (limits[s] > Bytes{0}) limits[s] = {limits[s].value / part};
        if (!sections_[s].slots(limits[s])) limits[s] = kUnmoved;
      }
      attempt(&best, limits, best != unmoved);
    }
    for (size_t s = 0; s < best.size(); ++s) {
      if (!moves(s, best[s])) continue;
      Limits without = best;
      without[s] = kUnmoved;
      attempt(&best, without, true);
    }
    return best;
  }

  const StepProgram& program_;
  const PassEnvironment& environment_;
  const PrefetchOptions& options_;
  MemoryTimeline timeline_;
  std::vector<SectionGathers> sections_;
  std::optional<StepProgram> trial_;  // a copy to try limits on
  int simulated_ = 0;
  std::optional<Nanos> before_, best_;
};

// What a gather passes on its way up.
struct Passed {
  int runs = 0, updates = 0;
  Nanos compute;
};

Passed passed(const StepProgram& program, const Section& section, size_t from, size_t to,
              const Estimator* estimator) {
  Passed out;
  for (size_t i = from; i < to; ++i) {
    const Instr& instr = section.instrs[i];
    if (traits(instr.op).resource != Resource::kCompute) continue;
    out.runs += instr.op == Op::kRun ? 1 : 0;
    out.updates += instr.op == Op::kUpdate ? 1 : 0;
    if (estimator != nullptr) out.compute += estimator->duration(program, instr);
  }
  return out;
}

std::string counted(int count, const std::string& what) {
  return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

void explain_section(const StepProgram& program, size_t s, const SectionGathers& gathers,
                     Bytes limit, PassContext& context) {
  const Section& section = program.sections[s];
  const Estimator* estimator = context.environment().estimator;
  int moved = 0;
  gathers.for_each_moved(*gathers.slots(limit), [&](size_t at, size_t slot) {
    ++moved;
    const Instr& gather = section.instrs[at];
    const Passed what = passed(program, section, slot, at, estimator);
    std::string text = section_name(section) + ": gathered ahead of " +
                       (what.runs > 0 || what.updates == 0 ? counted(what.runs, "run")
                                                           : counted(what.updates, "update"));
    text += ": " + pretty(program.full_bytes(*gather.param));
    if (estimator != nullptr) {
      text += ", a transfer of " + pretty(estimator->duration(program, gather)) + " beside " +
              pretty(what.compute) + " of compute";
    }
    context.because(*gather.param, std::move(text));
  });
  if (moved == 0) return;
  context.because(section_name(section) + ": " + counted(moved, "gather") + " earlier, at most " +
                  pretty(limit) + " (" + to_string(limit) + ") gathered ahead of use");
}

void explain_step(const Planner& planner, const StepProgram& result, PassContext& context) {
  const PassEnvironment& environment = context.environment();
  const MemoryTimeline timeline = memory_timeline(result);
  DC_CHECK(!environment.memory_budget || timeline.peak <= *environment.memory_budget,
           "prefetch went over the memory budget");
  std::string text = "peak " + pretty(timeline.peak);
  if (environment.memory_budget) text += " of " + pretty(*environment.memory_budget);
  if (planner.before()) {
    text += *planner.best() < *planner.before()
                ? ", step " + pretty(*planner.before()) + " -> " + pretty(*planner.best())
                : ", step " + pretty(*planner.before()) + ": no earlier gather shortens it";
  } else {
    text += ", not simulated";
  }
  context.because(std::move(text));
}

}  // namespace

Contract Prefetch::contract() const {
  return {.needs = {Fact::kGathersPlaced}};
}

void Prefetch::run(StepProgram& program, PassContext& context) const {
  Planner planner(program, context.environment(), options_);
  const Limits limits = options_.agreed.empty() ? planner.choose() : planner.agreed();
  std::vector<std::vector<Instr>> result = planner.apply(limits);
  const bool explained = context.environment().reasons;
  for (size_t s = 0; explained && s < limits.size(); ++s) {
    explain_section(program, s, planner.section(s), limits[s], context);
  }
  replace_instrs(std::move(result), &program);
  if (explained) explain_step(planner, program, context);
}

}  // namespace deepcompile
