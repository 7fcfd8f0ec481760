// SPDX-License-Identifier: Apache-2.0
#include "passes/offload_activation.h"

#include <algorithm>
#include <map>
#include <string>
#include <tuple>

#include "analysis/liveness.h"
#include "base/error.h"
#include "ir/text.h"
#include "passes/host_copies.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

constexpr int kMostRounds = 6;
constexpr size_t kNowhere = static_cast<size_t>(-1);

// A value that can wait on the host. Points are the step's.
struct Idle {
  ValueId value{};
  Bytes bytes;
  size_t forward = 0, backward = 0;  // sections
  size_t made = 0;                   // by this instruction
  size_t used = 0;                   // last read in the forward by this one, or made
  size_t needed = 0;                 // first read in the backward by this one
  Nanos in, out;                     // copies
  Nanos time;                        // between, with the copies done
  size_t from = 0, to = 0;           // away at most from this point to before that
};

class IdleFinder {
 public:
  IdleFinder(const StepProgram& program, const StepClock& clock, const Estimator* estimator)
      : program_(program),
        clock_(clock),
        estimator_(estimator),
        liveness_(analyze_liveness(program)),
        barred_(program.values.size(), false),
        made_(program.values.size(), kNowhere),
        used_(program.values.size(), kNowhere),
        needed_(program.values.size(), kNowhere) {
    for (const Section& section : program.sections) {
      for (ValueId id : section.inputs) barred_[index(id)] = true;
      for (ValueId id : section.outputs) barred_[index(id)] = true;
    }
  }

  // Those of all graphs, the earliest made first.
  std::vector<Idle> find() {
    std::vector<Idle> out;
    for (size_t s = 0; s < program_.sections.size(); ++s) {
      if (program_.sections[s].kind != SectionKind::kForward) continue;
      const auto backward =
          program_.find_section(SectionKind::kBackward, program_.sections[s].graph);
      if (!backward) continue;
      scan(s, true);
      scan(index(*backward), false);
      for (ValueId id : liveness_.sections[s].saved) add(id, s, index(*backward), &out);
    }
    std::stable_sort(out.begin(), out.end(),
                     [](const Idle& a, const Idle& b) { return a.made < b.made; });
    return out;
  }

 private:
  void scan(size_t section, bool forward) {
    const std::vector<Instr>& instrs = program_.sections[section].instrs;
    for (size_t i = 0; i < instrs.size(); ++i) {
      const size_t point = clock_.point(section, i);
      const auto read = [&](ValueId id) {
        if (forward) used_[index(id)] = point;
        if (!forward && needed_[index(id)] == kNowhere) needed_[index(id)] = point;
      };
      const bool moves = traits(instrs[i].op).takes_values && instrs[i].op != Op::kReduce;
      for (ValueId id : instrs[i].values) {
        if (moves) barred_[index(id)] = true;
        read(id);
      }
      if (instrs[i].op != Op::kRun) continue;
      const Region& region = program_.region(*instrs[i].region);
      for (const Operand& operand : region.inputs) {
        if (const auto* id = std::get_if<ValueId>(&operand)) read(*id);
      }
      if (!forward) continue;
      for (ValueId id : region.outputs) made_[index(id)] = used_[index(id)] = point;
    }
  }

  void add(ValueId id, size_t forward, size_t backward, std::vector<Idle>* out) const {
    const size_t v = index(id);
    if (barred_[v] || made_[v] == kNowhere || needed_[v] == kNowhere) return;
    const auto time = [&](Op op) {
      return time_of(program_, estimator_, {op, std::nullopt, std::nullopt, {id}});
    };
    Idle idle{id,
              program_.value(id).bytes,
              forward,
              backward,
              made_[v],
              used_[v],
              needed_[v],
              time(Op::kReload),
              time(Op::kOffload),
              {},
              0,
              0};
    const Nanos done = clock_.before(idle.made + 1) + idle.out;
    const Nanos start = clock_.before(idle.needed) - idle.in;
    idle.from = clock_.first_at(done, idle.used + 1, clock_.end(forward));
    idle.to = clock_.last_at(start, clock_.start(backward), idle.needed);
    idle.time = start - done;
    out->push_back(idle);
  }

  const StepProgram& program_;
  const StepClock& clock_;
  const Estimator* estimator_;
  Liveness liveness_;
  std::vector<bool> barred_;  // by value: the caller's too, or moved already
  std::vector<size_t> made_, used_, needed_;
};

// Adds what waits longest, until the fullest point fits; if nothing that has
// the time is away there, what compute would have to wait for.
class IdleChoice {
 public:
  IdleChoice(const std::vector<Idle>& all, Bytes smallest, const MemoryTimeline& timeline)
      : all_(all), away_(all.size(), Away::kNever), use_(bytes_during(timeline)) {
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i].bytes >= smallest) order_.push_back(i);
    }
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return all[a].time > all[b].time; });
  }

  // False once all that helps is chosen.
  bool reach(Bytes limit) {
    while (use_.max() > limit) {
      const size_t place = use_.fullest();
      if (!take(place, Away::kCopied) && !take(place, Away::kForced)) return false;
    }
    return true;
  }

  std::vector<Idle> chosen() const {
    std::vector<Idle> out;
    for (size_t i = 0; i < all_.size(); ++i) {
      if (away_[i] != Away::kNever) out.push_back(all_[i]);
    }
    return out;
  }

 private:
  // Only once the copies are done; or from the last use to the next.
  enum class Away : uint8_t { kNever, kCopied, kForced };

  std::pair<size_t, size_t> span(size_t i, Away away) const {
    const Idle& each = all_[i];
    if (away == Away::kForced) return {each.used + 1, each.needed};
    return {each.from, away == Away::kNever ? each.from : std::max(each.from, each.to)};
  }

  bool take(size_t place, Away away) {
    size_t& next = away == Away::kCopied ? copied_ : forced_;
    while (next < order_.size() && away_[order_[next]] >= away) ++next;
    for (size_t k = next; k < order_.size(); ++k) {
      const size_t i = order_[k];
      const auto [first, last] = span(i, away);
      if (away_[i] >= away || place < first || last <= place) continue;
      const auto [had_first, had_last] = span(i, away_[i]);
      use_.add(had_first, had_last, all_[i].bytes);
      use_.add(first, last, Bytes{0} - all_[i].bytes);
      away_[i] = away;
      return true;
    }
    return false;
  }

  const std::vector<Idle>& all_;
  std::vector<Away> away_;
  std::vector<size_t> order_;       // longest first
  size_t copied_ = 0, forced_ = 0;  // in order_: before these all are away
  MemoryUse use_;
};

// What one instruction copies out, or in.
struct Group {
  std::vector<Idle> values;
  Bytes bytes;
  Nanos time;
  size_t at = 0;  // evicted, or reloaded, before this point
};

template <typename Key>
std::vector<Group> grouped(const std::vector<Idle>& values, Key key, Nanos Idle::*time) {
  std::map<size_t, Group> groups;
  for (const Idle& each : values) {
    Group& group = groups[key(each)];
    group.values.push_back(each);
    group.bytes += each.bytes;
    group.time += each.*time;
  }
  std::vector<Group> out;
  for (auto& [at, group] : groups) out.push_back(std::move(group));
  return out;
}

struct Moves {
  std::vector<Group> out, in;
};

size_t last_use(const Group& group) {
  size_t used = 0;
  for (const Idle& each : group.values) used = std::max(used, each.used);
  return used;
}

// What a region makes leaves together. Only where memory is short while one of it is still used,
// what is not goes first.
std::vector<Group> parts_of(Group group, std::optional<Bytes> limit, const MemoryUse& use) {
  size_t first = last_use(group);
  for (const Idle& each : group.values) first = std::min(first, each.used);
  if (!limit || !use.first_above(first + 1, last_use(group) + 1, *limit)) {
    return {std::move(group)};
  }
  return grouped(
      group.values, [](const Idle& each) { return each.used; }, &Idle::out);
}

Moves place_moves(const StepClock& clock, const MemoryTimeline& timeline,
                  std::optional<Bytes> limit, const std::vector<Idle>& chosen) {
  Moves moves{grouped(
                  chosen, [](const Idle& each) { return each.made; }, &Idle::out),
              grouped(
                  chosen, [](const Idle& each) { return each.needed; }, &Idle::in)};
  MemoryUse use(bytes_during(timeline));
  OutboundQueue queue(clock);
  std::vector<Group> out;
  for (size_t i = 0; i < moves.out.size(); ++i) {
    size_t last = clock.end(moves.out[i].values[0].forward);
    if (!limit && i + kCopiesAhead < moves.out.size() &&
        moves.out[i + kCopiesAhead].values[0].forward == moves.out[i].values[0].forward) {
      const size_t made = moves.out[i + kCopiesAhead].values[0].made;
      last = std::clamp(made, last_use(moves.out[i]) + 1, last);
    }
    for (Group& group : parts_of(moves.out[i], limit, use)) {
      const size_t issued = group.values[0].made + 1, first = last_use(group) + 1;
      group.at = queue.place({issued, first, last, group.time, group.bytes}, use, limit);
      for (const Idle& each : group.values) use.add(group.at, each.needed, Bytes{0} - each.bytes);
      out.push_back(std::move(group));
    }
  }
  moves.out = std::move(out);
  std::vector<InboundCopy> copies;
  for (const Group& group : moves.in) {
    const Idle& any = group.values[0];
    copies.push_back({clock.start(any.backward), any.needed, group.time, group.bytes});
  }
  const std::vector<size_t> starts = place_copies_in(clock, copies, limit, &use);
  for (size_t i = 0; i < starts.size(); ++i) moves.in[i].at = starts[i];
  return moves;
}

SectionInstrs with_moves(const StepProgram& program, const StepClock& clock, const Moves& moves) {
  // At one place: what starts to leave, what has left, what comes, what is there.
  std::vector<std::tuple<size_t, size_t, Op, std::vector<ValueId>>> instrs;
  const auto add = [&](size_t section, size_t point, Op op, const Group& group) {
    std::vector<ValueId> ids;
    for (const Idle& each : group.values) ids.push_back(each.value);
    std::sort(ids.begin(), ids.end());
    instrs.emplace_back(section, point - clock.start(section), op, std::move(ids));
  };
  for (const Group& group : moves.out) {
    const Idle& any = group.values[0];
    add(any.forward, any.made + 1, Op::kOffload, group);
    add(any.forward, group.at, Op::kEvict, group);
  }
  for (const Group& group : moves.in) {
    const Idle& any = group.values[0];
    add(any.backward, group.at, Op::kReload, group);
    add(any.backward, any.needed, Op::kAwait, group);
  }
  std::stable_sort(instrs.begin(), instrs.end(), [](const auto& a, const auto& b) {
    const auto key = [](const auto& each) {
      return std::tuple(std::get<0>(each), std::get<1>(each), std::get<2>(each));
    };
    return key(a) < key(b);
  });
  std::vector<SectionEdit> edits;
  edits.reserve(program.sections.size());
  for (const Section& section : program.sections) edits.emplace_back(section.instrs);
  for (auto& [section, at, op, values] : instrs) {
    edits[section].insert(at, {op, std::nullopt, std::nullopt, std::move(values)});
  }
  SectionInstrs out;
  for (SectionEdit& edit : edits) out.push_back(std::move(edit).apply());
  return out;
}

struct Result {
  SectionInstrs instrs;  // empty: as they were
  Moves moves;
  Bytes peak;
};

class Offloader {
 public:
  Offloader(const StepProgram& program, const PassEnvironment& environment,
            const MemoryTimeline* known)
      : program_(program),
        environment_(environment),
        clock_(program, environment.estimator),
        timeline_(known != nullptr ? *known : memory_timeline(program)),
        all_(IdleFinder(program, clock_, environment.estimator).find()) {}

  Result named(const std::vector<ValueId>& ids) const {
    std::vector<bool> there(program_.values.size(), false), wanted = there;
    for (const Idle& each : all_) there[index(each.value)] = true;
    for (ValueId id : ids) {
      const bool known = index(id) < program_.values.size();
      if (known) wanted[index(id)] = true;
      if (known && there[index(id)]) continue;
      throw UserError("[passes] offload_activation: value " +
                      (known ? program_.value(id).name : std::to_string(index(id))) +
                      " cannot wait on the host: only what a forward's region makes and its "
                      "backward reads can, unless the caller has it too, it is made again, or "
                      "another pass moves it. Leave it out.");
    }
    std::vector<Idle> chosen;
    for (const Idle& each : all_) {
      if (wanted[index(each.value)]) chosen.push_back(each);
    }
    return build(chosen, environment_.reasons);
  }

  Result choose(Bytes peak, Bytes smallest) const {
    const Bytes budget = *environment_.memory_budget;
    IdleChoice choice(all_, smallest, timeline_);
    Result best{{}, {}, peak};
    Bytes limit = budget;
    for (int round = 0; round < kMostRounds; ++round) {
      const bool reached = choice.reach(limit);
      Result result = build(choice.chosen());
      const Bytes missing = result.peak - budget;
      if (result.peak < best.peak) best = std::move(result);
      if (!reached || missing <= Bytes{0}) break;
      limit -= missing;
    }
    return best;
  }

  size_t count() const { return all_.size(); }

  // A reason for each region whose outputs leave.
  void explain(const Moves& moves, PassContext& context) const {
    for (const Group& group : moves.out) {
      const auto [section, at] = clock_.place(group.values[0].made);
      Nanos in;
      std::string names;
      for (const Idle& each : group.values) {
        names += (names.empty() ? "" : ", ") + program_.value(each.value).name;
        in += each.in;
      }
      const Nanos done = clock_.before(group.values[0].made + 1) + group.time;
      const Nanos early = done - clock_.before(group.at);
      context.because(
          *program_.sections[section].instrs[at].region,
          names + " on the host until the backward: " + pretty(group.bytes) + " less, " +
              pretty(group.time) + " out and " + pretty(in) + " in, beside compute" +
              (early > Nanos{0} ? "; compute may wait " + pretty(early) + " for the copy out"
                                : ""));
    }
  }

 private:
  Result build(const std::vector<Idle>& chosen, bool measured = true) const {
    Moves moves = place_moves(clock_, timeline_, environment_.memory_budget, chosen);
    SectionInstrs instrs = with_moves(program_, clock_, moves);
    const Bytes peak = measured ? peak_with(program_, instrs) : Bytes{};
    return {std::move(instrs), std::move(moves), peak};
  }

  const StepProgram& program_;
  const PassEnvironment& environment_;
  StepClock clock_;
  MemoryTimeline timeline_;
  std::vector<Idle> all_;
};

}  // namespace

void OffloadActivation::run(StepProgram& program, PassContext& context) const {
  const PassEnvironment& environment = context.environment();
  const auto budget = environment.memory_budget;
  // What is named needs no peak but for its reasons.
  const bool measured = !options_.values || environment.reasons;
  Bytes peak;
  if (options_.values) {
    if (measured) peak = memory_peak(program);
  } else {
    const auto above = peak_above_budget(program, context, "all activations stay");
    if (!above) return;
    peak = *above;
  }
  const Offloader offloader(program, environment, options_.timeline);
  Result result = options_.values ? offloader.named(*options_.values)
                                  : offloader.choose(peak, options_.smallest);
  if (environment.reasons) offloader.explain(result.moves, context);
  Bytes bytes;
  Nanos time;
  size_t values = 0;
  for (const Group& group : result.moves.out) {
    bytes += group.bytes;
    time += group.time;
    values += group.values.size();
  }
  for (const Group& group : result.moves.in) time += group.time;
  std::string text = std::to_string(values) + " of " + std::to_string(offloader.count()) +
                     " saved activations wait on the host, " + pretty(bytes) + ", " + pretty(time) +
                     " of copies a micro batch; peak " + pretty(peak) + " -> " +
                     pretty(result.peak);
  if (budget) text += " of " + pretty(*budget);
  if (budget && result.peak > *budget) text += ", and no other activations lower it";
  context.because(std::move(text));
  replace_instrs(std::move(result.instrs), &program);
}

}  // namespace deepcompile
