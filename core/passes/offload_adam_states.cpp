// SPDX-License-Identifier: Apache-2.0
#include "passes/offload_adam_states.h"

#include <algorithm>
#include <string>
#include <tuple>

#include "analysis/footprint.h"
#include "base/error.h"
#include "ir/text.h"
#include "passes/host_copies.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

constexpr int kMostStateRounds = 6;

// A parameter whose states can move, and where its update is.
struct Site {
  ParamId param{};
  uint32_t section = 0;
  size_t point = 0;  // of the update
  Bytes bytes;       // of the states
  Nanos in, out;     // copies
};

class Sites {
 public:
  Sites(const StepProgram& program, const StepClock& clock, const Estimator* estimator)
      : program_(program), updates_(program.params.size()), moved_(program.params.size(), false) {
    std::vector<bool> deferred(program.params.size(), false);
    for (uint32_t s = 0; s < program.sections.size(); ++s) {
      const std::vector<Instr>& instrs = program.sections[s].instrs;
      for (size_t i = 0; i < instrs.size(); ++i) {
        if (!instrs[i].param) continue;
        const size_t p = index(*instrs[i].param);
        if (instrs[i].op == Op::kDefer) deferred[p] = true;
        if (is_move(instrs[i].op)) moved_[p] = true;
        if (instrs[i].op == Op::kUpdate) updates_[p].push_back({s, clock.point(s, i)});
      }
    }
    for (size_t p = 0; p < updates_.size(); ++p) add(ParamId{static_cast<uint32_t>(p)}, estimator);
    std::stable_sort(sites_.begin(), sites_.end(),
                     [](const Site& a, const Site& b) { return a.point < b.point; });
  }

  // In the order of their updates.
  const std::vector<Site>& all() const { return sites_; }

 private:
  struct Update {
    uint32_t section;
    size_t point;
  };

  static bool is_move(Op op) {
    return op == Op::kOffloadStates || op == Op::kEvictStates || op == Op::kReloadStates ||
           op == Op::kAwaitStates;
  }

  // The first update is the one that does the work: a backward's leaves
  // nothing to the update section. Several forwards that may each be the one
  // are left alone, and so is what a gather updates.
  void add(ParamId id, const Estimator* estimator) {
    const std::vector<Update>& updates = updates_[index(id)];
    if (moved_[index(id)] || updates.empty() || !program_.param(id).trainable) return;
    const auto in_forward = std::count_if(updates.begin(), updates.end(), [&](const Update& each) {
      return program_.sections[each.section].kind == SectionKind::kForward;
    });
    if (in_forward > 1) return;
    const auto time = [&](Op op) { return time_of(program_, estimator, on_param(op, id)); };
    const Site site{id,
                    updates[0].section,
                    updates[0].point,
                    footprint(program_, id).states(),
                    time(Op::kReloadStates),
                    time(Op::kOffloadStates)};
    sites_.push_back(site);
  }

  const StepProgram& program_;
  std::vector<std::vector<Update>> updates_;  // by parameter
  std::vector<bool> moved_;                   // by parameter: something moves it already
  std::vector<Site> sites_;
};

// Where one parameter's moves stand: before points of these sections.
struct StateMoves {
  uint32_t reload_section = 0, evict_section = 0;
  size_t reload = 0, evict = 0;
};

// Places the moves of the chosen sites, given the memory of the step as it is.
class MovePlacer {
 public:
  MovePlacer(const StepProgram& program, const StepClock& clock, const MemoryTimeline& timeline,
             std::optional<Bytes> limit, std::vector<Site> sites)
      : program_(program),
        clock_(clock),
        limit_(limit),
        sites_(std::move(sites)),
        use_(without_states(bytes_during(timeline), sites_)) {}

  std::vector<StateMoves> beside_compute() {
    std::vector<InboundCopy> in;
    for (const Site& site : sites_) {
      in.push_back({clock_.start(reload_section(site)), site.point, site.in, site.bytes});
    }
    const std::vector<size_t> starts = latest_starts(clock_, in);
    OutboundQueue queue(clock_);
    std::vector<StateMoves> out(sites_.size());
    for (size_t i = 0; i < sites_.size(); ++i) {
      size_t start = starts[i];
      if (i > 0) start = std::max(start, std::min(out[i - 1].reload, sites_[i].point));
      if (!limit_ && i >= kCopiesAhead) {
        start = std::max(start, std::min(sites_[i - kCopiesAhead].point + 1, sites_[i].point));
      }
      out[i].reload = with_room(in[i], start, limit_, use_);
      out[i].reload_section = section_of(out[i].reload, sites_[i]);
      use_.add(out[i].reload, sites_[i].point, sites_[i].bytes);
      place_evict(i, &queue, &out[i]);
    }
    return out;
  }

  std::vector<StateMoves> at_updates() const {
    std::vector<StateMoves> out;
    for (const Site& site : sites_) {
      out.push_back({site.section, site.section, site.point, site.point + 1});
    }
    return out;
  }

 private:
  // States are there for their updates alone.
  static std::vector<Bytes> without_states(std::vector<Bytes> use, const std::vector<Site>& sites) {
    Bytes all;
    for (const Site& site : sites) {
      all += site.bytes;
      use[site.point] += site.bytes;
    }
    for (Bytes& bytes : use) bytes -= all;
    return use;
  }

  bool spreads(const Site& site) const {
    return program_.accumulation == 1 &&
           program_.sections[site.section].kind == SectionKind::kUpdate;
  }
  // The first section in which the states may come in.
  uint32_t reload_section(const Site& site) const {
    if (!spreads(site) || site.section == 0) return site.section;
    const uint32_t before = site.section - 1;
    return program_.sections[before].kind == SectionKind::kBackward ? before : site.section;
  }
  uint32_t section_of(size_t point, const Site& site) const {
    return point < clock_.start(site.section) ? site.section - 1 : site.section;
  }

  // The section after the one of the update that may give the memory back.
  std::optional<uint32_t> evict_section(const Site& site) const {
    const std::vector<Section>& sections = program_.sections;
    const SectionKind kind = sections[site.section].kind;
    if (program_.accumulation != 1 || kind == SectionKind::kBackward) return std::nullopt;
    const bool update = kind == SectionKind::kUpdate;
    const uint32_t next = update ? 0 : site.section + 1;
    const SectionKind wanted = update ? SectionKind::kForward : SectionKind::kBackward;
    if (next == sections.size() || sections[next].kind != wanted) return std::nullopt;
    return next;
  }

  // After the update, in its section; or, if the copy is not done by its end,
  // in the one that follows.
  void place_evict(size_t i, OutboundQueue* queue, StateMoves* moves) {
    const Site& site = sites_[i];
    const size_t after = site.point + 1;
    size_t last = clock_.end(site.section);
    if (!limit_ && i + kCopiesAhead < sites_.size() &&
        sites_[i + kCopiesAhead].section == site.section) {
      last = std::min(last, sites_[i + kCopiesAhead].point);
    }
    std::optional<Bytes> room;
    if (limit_) room = *limit_ - site.bytes;
    moves->evict_section = site.section;
    moves->evict = queue->place({after, after, last, site.out, site.bytes}, use_, room);
    use_.add(after, moves->evict, site.bytes);
    const Nanos left = queue->done() - clock_.before(last);
    const bool on = moves->evict == last && last == clock_.end(site.section) && left > Nanos{0};
    const auto next = evict_section(site);
    if (!on || !next) return;
    const size_t start = clock_.start(*next);
    const size_t done = clock_.first_at(clock_.before(start) + left, start, clock_.end(*next));
    if (start < last) use_.add(last, use_.size(), site.bytes);
    moves->evict_section = *next;
    moves->evict = room ? use_.first_above(start, done, *room).value_or(done) : done;
    use_.add(start, moves->evict, site.bytes);
  }

  const StepProgram& program_;
  const StepClock& clock_;
  std::optional<Bytes> limit_;
  std::vector<Site> sites_;  // in the order of their updates
  MemoryUse use_;            // by point
};

SectionInstrs with_moves(const StepProgram& program, const StepClock& clock,
                         const std::vector<Site>& sites, const std::vector<StateMoves>& moves) {
  // At one place: what leaves first, then what comes.
  std::vector<std::tuple<uint32_t, size_t, Op, ParamId>> instrs;
  const auto add = [&](uint32_t section, size_t point, Op op, ParamId param) {
    instrs.emplace_back(section, point - clock.start(section), op, param);
  };
  for (size_t i = 0; i < sites.size(); ++i) {
    const Site& site = sites[i];
    add(moves[i].reload_section, moves[i].reload, Op::kReloadStates, site.param);
    add(site.section, site.point, Op::kAwaitStates, site.param);
    add(site.section, site.point + 1, Op::kOffloadStates, site.param);
    add(moves[i].evict_section, moves[i].evict, Op::kEvictStates, site.param);
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
  for (const auto& [section, at, op, param] : instrs)
    edits[section].insert(at, on_param(op, param));
  SectionInstrs out;
  for (SectionEdit& edit : edits) out.push_back(std::move(edit).apply());
  return out;
}

// Adds the largest, until the states that are away make the fullest point fit;
// of equal ones the last that is updated: the updates before it give gradients
// back, so that there is room and time for its copy in.
class SiteChoice {
 public:
  SiteChoice(const std::vector<Site>& sites, const MemoryTimeline& timeline)
      : sites_(sites), chosen_(sites.size(), false), use_(bytes_during(timeline)) {
    for (size_t i = sites.size(); i-- > 0;) order_.push_back(i);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return sites[a].bytes > sites[b].bytes; });
  }

  // Whether it did, or could: false once all that helps is chosen.
  bool reach(Bytes limit) {
    while (use_.max() > limit) {
      const size_t place = use_.fullest();
      const auto next = std::find_if(order_.begin(), order_.end(), [&](size_t i) {
        return !chosen_[i] && sites_[i].point != place;
      });
      if (next == order_.end()) return false;
      take(*next);
    }
    return true;
  }

  std::vector<Site> chosen() const {
    std::vector<Site> out;
    for (size_t i = 0; i < sites_.size(); ++i) {
      if (chosen_[i]) out.push_back(sites_[i]);
    }
    return out;
  }

 private:
  void take(size_t i) {
    chosen_[i] = true;
    use_.add(0, sites_[i].point, Bytes{0} - sites_[i].bytes);
    use_.add(sites_[i].point + 1, use_.size(), Bytes{0} - sites_[i].bytes);
  }

  const std::vector<Site>& sites_;
  std::vector<bool> chosen_;
  std::vector<size_t> order_;  // largest first, of equal ones the last updated
  MemoryUse use_;
};

struct StatesResult {
  SectionInstrs instrs;  // empty: as they were
  std::vector<Site> sites;
  std::vector<StateMoves> moves;
  Bytes peak;
};

class StatesOffloader {
 public:
  StatesOffloader(const StepProgram& program, const PassEnvironment& environment,
                  const OffloadAdamStatesOptions& options)
      : program_(program),
        environment_(environment),
        synchronous_(options.synchronous),
        clock_(program, environment.estimator),
        timeline_(options.timeline != nullptr ? *options.timeline : memory_timeline(program)),
        sites_(program, clock_, environment.estimator) {}

  const std::vector<Site>& sites() const { return sites_.all(); }

  StatesResult build(std::vector<Site> sites, bool measured = true) const {
    MovePlacer placer(program_, clock_, timeline_, environment_.memory_budget, sites);
    std::vector<StateMoves> moves = synchronous_ ? placer.at_updates() : placer.beside_compute();
    SectionInstrs instrs = with_moves(program_, clock_, sites, moves);
    const Bytes peak = measured ? peak_with(program_, instrs) : Bytes{};
    return {std::move(instrs), std::move(sites), std::move(moves), peak};
  }

  StatesResult choose(Bytes peak) const {
    const Bytes budget = *environment_.memory_budget;
    SiteChoice choice(sites(), timeline_);
    StatesResult best{{}, {}, {}, peak};
    Bytes limit = budget;
    for (int round = 0; round < kMostStateRounds && !sites().empty(); ++round) {
      const bool reached = choice.reach(limit);
      StatesResult result = build(choice.chosen());
      const Bytes missing = result.peak - budget;
      if (result.peak < best.peak) best = std::move(result);
      if (!reached || missing <= Bytes{0}) break;
      limit -= missing;
    }
    return best;
  }

  std::string place_of(uint32_t section, const Site& site) const {
    if (section == site.section) return "";
    const bool next =
        section < site.section && program_.sections[section].kind == SectionKind::kForward;
    return " (" + section_name(program_.sections[section]) + (next ? " of the next step)" : ")");
  }

 private:
  const StepProgram& program_;
  const PassEnvironment& environment_;
  bool synchronous_;
  StepClock clock_;
  MemoryTimeline timeline_;
  Sites sites_;
};

std::vector<Site> named_sites(const StepProgram& program, const std::vector<Site>& sites,
                              const std::vector<ParamId>& params, std::string_view pass) {
  std::vector<bool> there(program.params.size(), false), wanted = there;
  for (const Site& site : sites) there[index(site.param)] = true;
  for (ParamId id : params) {
    const bool known = index(id) < program.params.size();
    if (known) wanted[index(id)] = true;
    if (known && there[index(id)]) continue;
    throw UserError("[passes] " + std::string(pass) + ": parameter " +
                    (known ? program.param(id).name : std::to_string(index(id))) +
                    " has no optimizer states to move: it is frozen or unknown, nothing updates "
                    "it in one place, or another pass moves them. Leave it out.");
  }
  std::vector<Site> out;
  for (const Site& site : sites) {
    if (wanted[index(site.param)]) out.push_back(site);
  }
  return out;
}

}  // namespace

Contract OffloadAdamStates::contract() const {
  return {.needs = {Fact::kUpdatesPlaced}};
}

void OffloadAdamStates::run(StepProgram& program, PassContext& context) const {
  const PassEnvironment& environment = context.environment();
  const auto budget = environment.memory_budget;
  // What is named needs no peak but for its reasons.
  const bool measured = !options_.params || environment.reasons;
  Bytes peak;
  if (options_.params) {
    if (measured) peak = memory_peak(program);
  } else {
    const auto above = peak_above_budget(program, context, "all optimizer states stay");
    if (!above) return;
    peak = *above;
  }
  const StatesOffloader offloader(program, environment, options_);
  StatesResult result =
      options_.params
          ? offloader.build(named_sites(program, offloader.sites(), *options_.params, name()),
                            measured)
          : offloader.choose(peak);
  Bytes bytes;
  Nanos time;
  for (size_t i = 0; i < result.sites.size(); ++i) {
    const Site& site = result.sites[i];
    bytes += site.bytes;
    time += site.in + site.out;
    if (!environment.reasons) continue;
    context.because(site.param,
                    "optimizer states on the host but for the update: " + pretty(site.bytes) +
                        " less; " + pretty(site.in) + " in" +
                        offloader.place_of(result.moves[i].reload_section, site) + " and " +
                        pretty(site.out) + " out" +
                        offloader.place_of(result.moves[i].evict_section, site) +
                        (options_.synchronous ? ", while compute waits" : ", beside compute"));
  }
  std::string text = "states of " + std::to_string(result.sites.size()) + " of " +
                     std::to_string(offloader.sites().size()) + " parameters on the host, " +
                     pretty(bytes) + ", " + pretty(time) + " of copies a step; peak " +
                     pretty(peak) + " -> " + pretty(result.peak);
  if (budget) text += " of " + pretty(*budget);
  if (budget && result.peak > *budget) text += ", and no other states lower it";
  context.because(std::move(text));
  replace_instrs(std::move(result.instrs), &program);
}

}  // namespace deepcompile
