// SPDX-License-Identifier: Apache-2.0
#include "passes/gaps.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "analysis/footprint.h"

namespace deepcompile {
namespace {

class GapFinder {
 public:
  GapFinder(const StepProgram& program, const Estimator& estimator)
      : program_(program), estimator_(estimator), events_(program.params.size()) {
    size_t at = 0;
    for (size_t s = 0; s < program.sections.size(); ++s) {
      const auto& instrs = program.sections[s].instrs;
      for (size_t i = 0; i < instrs.size(); ++i, ++at) {
        const Op op = instrs[i].op;
        const bool counts = op == Op::kGather || op == Op::kRelease || op == Op::kUpdate;
        if (counts) events_[index(*instrs[i].param)].push_back({{s, i, at}, op});
      }
    }
  }

  std::vector<Gap> find() const {
    std::vector<Gap> gaps;
    for (size_t p = 0; p < events_.size(); ++p) {
      const ParamId id{static_cast<uint32_t>(p)};
      // A sharded parameter gathered in the update is gathered for that: leave it.
      if (program_.params[p].placement != Placement::kSharded || in_update(events_[p])) continue;
      // Rows are good for one micro batch's section alone.
      if (program_.rows_read(id) > 0) continue;
      uint32_t releases = 0;
      for (size_t i = 0; i < events_[p].size(); ++i) {
        if (events_[p][i].op == Op::kRelease) add({id, releases++}, i, &gaps);
      }
    }
    return gaps;
  }

 private:
  struct Event {
    StepPoint point;
    Op op;
  };

  bool in_update(const std::vector<Event>& events) const {
    return std::any_of(events.begin(), events.end(), [&](const Event& event) {
      return event.op == Op::kGather &&
             program_.sections[event.point.section].kind == SectionKind::kUpdate;
    });
  }

  void add(GapId id, size_t release, std::vector<Gap>* gaps) const {
    const std::vector<Event>& events = events_[index(id.param)];
    const auto is_gather = [](const Event& event) { return event.op == Op::kGather; };
    const auto from = events.begin() + static_cast<std::ptrdiff_t>(release);
    auto to = std::find_if(from, events.end(), is_gather);
    const bool wraps = to == events.end();
    const bool updated =
        !wraps && std::any_of(from, to, [](const Event& event) { return event.op == Op::kUpdate; });
    if (wraps) to = std::find_if(events.begin(), events.end(), is_gather);
    const Instr& gather = program_.sections[to->point.section].instrs[to->point.instr];
    // How often a step passes the gap with the buffer still good. After the
    // last micro batch comes the update of trainable parameters.
    const bool stale = updated || (wraps && program_.param(id.param).trainable);
    const int64_t times = program_.accumulation - (stale ? 1 : 0);
    gaps->push_back({id, from->point, to->point, wraps, updated,
                     footprint(program_, id.param).gathered,
                     estimator_.duration(program_, gather) * times});
  }

  const StepProgram& program_;
  const Estimator& estimator_;
  std::vector<std::vector<Event>> events_;  // by parameter, in order
};

}  // namespace

std::vector<Gap> find_gaps(const StepProgram& program, const Estimator& estimator) {
  return GapFinder(program, estimator).find();
}

std::vector<size_t> by_worth(const std::vector<Gap>& gaps, size_t points) {
  using Key = std::tuple<double, size_t, ParamId, size_t>;
  std::vector<Key> keys;
  keys.reserve(gaps.size());
  for (const Gap& gap : gaps) {
    const double worth =
        static_cast<double>(gap.saved.value) / static_cast<double>(gap.bytes.value);
    keys.emplace_back(-worth, gap.length(points), gap.id.param, gap.release.at);
  }
  std::vector<size_t> order(gaps.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return keys[a] < keys[b]; });
  return order;
}

void close_in(StepProgram& program, const std::vector<Gap>& gaps) {
  std::vector<std::vector<bool>> drop;
  for (const Section& section : program.sections) drop.emplace_back(section.instrs.size(), false);
  for (const Gap& gap : gaps) {
    if (!gap.closed) continue;
    drop[gap.release.section][gap.release.instr] = true;
    if (gap.wraps || gap.updated || gap.gather.section != gap.release.section) continue;
    const auto& instrs = program.sections[gap.gather.section].instrs;
    drop[gap.gather.section][gap.gather.instr] = true;
    for (size_t i = gap.gather.instr; i < instrs.size(); ++i) {
      if (instrs[i].op != Op::kWait || instrs[i].param != gap.id.param) continue;
      drop[gap.gather.section][i] = true;
      break;
    }
  }
  for (size_t s = 0; s < program.sections.size(); ++s) {
    size_t i = 0;
    std::erase_if(program.sections[s].instrs, [&](const Instr&) { return drop[s][i++]; });
  }
}

}  // namespace deepcompile
