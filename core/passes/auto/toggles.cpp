// SPDX-License-Identifier: Apache-2.0
// The second half of the search, for small programs: single toggles, and pairs
// of them where no single one helps.
#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "analysis/footprint.h"
#include "base/lists.h"
#include "passes/auto/search.h"

namespace deepcompile {
namespace {

using Toggle = std::function<void(AutoChoice&)>;

constexpr int kRunsAheadTried[] = {1, 2, 4};
constexpr size_t kSets = 24;                    // that single gaps and limits are tried on
constexpr Bytes kEverything{int64_t{1} << 40};  // a limit above all gathers of a small program

template <typename Id>
void print_ids(const std::vector<Id>& ids, std::string* out) {
  for (const Id id : ids) *out += std::to_string(index(id)) + ",";
  *out += ";";
}

// Equal for equal choices only.
std::string key_of(const AutoChoice& choice) {
  std::string key;
  print_ids(choice.recompute, &key);
  print_ids(choice.offload_values, &key);
  print_ids(choice.offload_states, &key);
  key += std::to_string(static_cast<int>(choice.place)) + "," + std::to_string(choice.ahead) + ";";
  for (const GapId& gap : *choice.keep) {
    key += std::to_string(index(gap.param)) + "." + std::to_string(gap.release) + ",";
  }
  for (const Bytes limit : choice.limits) key += ";" + std::to_string(limit.value);
  return key;
}

class ToggleSearch {
 public:
  ToggleSearch(AutoBuilder& builder, const MemoryMenu& menu, int simulations)
      : builder_(builder), menu_(menu), left_(simulations) {
    for (const Section& section : builder.classical().sections)
      limits_.push_back(limits_of(section));
  }

  // By single regions, values, parameters, gaps, limits and places.
  Found climb(const AutoChoice& start) {
    return climb(builder_.spelled_out(start), [this](const AutoChoice& c) { return toggles(c); });
  }

  // By what frees memory and places alone: what is kept follows by worth, and gathers go ahead as
  // far as there is room. A set that frees another way seldom helps before these follow it.
  Found climb_sets(AutoChoice start) {
    start.keep = std::nullopt;
    start.limits.assign(limits_.size(), kEverything);
    start.prefetch = std::nullopt;
    return climb(start, [this](const AutoChoice& choice) {
      std::vector<Toggle> out = memory_toggles(choice);
      add_places(choice, &out);
      return out;
    });
  }

  // All and nothing of each kind, with each place: far apart, so that climbs
  // from them seldom all end in the same wrong place.
  std::vector<AutoChoice> corners() const {
    std::vector<AutoChoice> out;
    for (const bool recompute : {false, true}) {
      for (const bool states : {false, true}) {
        AutoChoice choice;
        choice.prefetch = kEverything;
        choice.keep = std::nullopt;
        for (const RecomputeUnit& unit : menu_.recompute()) {
          if (!recompute) break;
          choice.recompute.insert(choice.recompute.end(), unit.regions.begin(), unit.regions.end());
        }
        for (const Movable& each : menu_.states()) {
          if (states) choice.offload_states.push_back(ParamId{each.id});
        }
        std::sort(choice.recompute.begin(), choice.recompute.end());
        std::sort(choice.offload_states.begin(), choice.offload_states.end());
        for (const Place place : {Place::kStep, Place::kNextForward, Place::kBackward}) {
          if (place == Place::kBackward && !builder_.early_updates()) continue;
          choice.place = place;
          out.push_back(choice);
        }
      }
    }
    return out;
  }

  // The best of all that climb_sets came by.
  std::vector<Found> best_sets() const {
    std::vector<Found> out = sets_;
    std::stable_sort(out.begin(), out.end(),
                     [](const Found& a, const Found& b) { return better(a.trial, b.trial); });
    if (out.size() > kSets) out.resize(kSets);
    return out;
  }

 private:
  using Toggles = std::function<std::vector<Toggle>(const AutoChoice&)>;

  Found climb(const AutoChoice& start, const Toggles& toggles) {
    Found best{start, measure(start)};
    while (left_ > 0 && (one(toggles, &best) || two(toggles, &best))) {
    }
    return best;
  }

  Trial measure(const AutoChoice& choice) {
    const bool by_worth = !choice.keep;
    const AutoChoice spelled = by_worth ? builder_.spelled_out(choice) : choice;
    const auto [at, is_new] = known_.try_emplace(key_of(spelled));
    if (is_new) {
      --left_;
      at->second = builder_.measure(spelled);
      if (by_worth) sets_.push_back({spelled, at->second});
    }
    return at->second;
  }

  // What is worth trying as a limit of a section: nothing, the largest gather,
  // and parts of all of them.
  std::vector<Bytes> limits_of(const Section& section) const {
    Bytes total, largest;
    for (const Instr& instr : section.instrs) {
      if (instr.op != Op::kGather) continue;
      const Bytes bytes = footprint(builder_.classical(), *instr.param).gathered;
      total += bytes;
      largest = std::max(largest, bytes);
    }
    std::set<Bytes> out{Bytes{-1}};
    if (total > Bytes{0}) out.insert({largest, {total.value / 2}, {total.value / 4}, total});
    return {out.begin(), out.end()};
  }

  std::vector<Toggle> memory_toggles(const AutoChoice& from) const {
    std::vector<Toggle> out;
    for (const RecomputeUnit& unit : menu_.recompute()) {
      for (RegionId id : unit.regions) {
        out.push_back([id](AutoChoice& choice) { flip(&choice.recompute, id); });
      }
    }
    for (const Movable& each : menu_.values(from.recompute)) {
      out.push_back([id = ValueId{each.id}](AutoChoice& c) { flip(&c.offload_values, id); });
    }
    for (const Movable& each : menu_.states()) {
      out.push_back([id = ParamId{each.id}](AutoChoice& c) { flip(&c.offload_states, id); });
    }
    return out;
  }

  std::vector<Toggle> toggles(const AutoChoice& from) {
    std::vector<Toggle> out = memory_toggles(from);
    add_gaps(from, &out);
    for (size_t s = 0; s < limits_.size(); ++s) {
      for (const Bytes limit : limits_[s]) {
        if (limit == from.limits[s]) continue;
        out.push_back([s, limit](AutoChoice& choice) { choice.limits[s] = limit; });
      }
    }
    add_places(from, &out);
    return out;
  }

  void add_gaps(const AutoChoice& from, std::vector<Toggle>* out) {
    for (const Gap& gap : builder_.gaps(from)) {
      out->push_back([id = gap.id](AutoChoice& choice) {
        auto& keep = *choice.keep;
        const auto at = std::lower_bound(keep.begin(), keep.end(), id);
        if (at != keep.end() && *at == id) {
          keep.erase(at);
        } else {
          keep.insert(at, id);
        }
      });
    }
  }

  void add_places(const AutoChoice& from, std::vector<Toggle>* out) const {
    const auto add = [&](Place place, int ahead) {
      if (place == from.place && ahead == from.ahead) return;
      out->push_back([place, ahead](AutoChoice& choice) {
        choice.place = place;
        choice.ahead = ahead;
      });
    };
    add(Place::kStep, 1);
    for (const int ahead : kRunsAheadTried) add(Place::kNextForward, ahead);
    if (builder_.early_updates()) add(Place::kBackward, 1);
  }

  // The best single toggle, if it helps.
  bool one(const Toggles& toggles, Found* best) {
    const AutoChoice from = best->choice;
    const Trial before = best->trial;
    for (const Toggle& toggle : toggles(from)) {
      if (left_ <= 0) break;
      consider(from, {&toggle}, best);
    }
    return better(best->trial, before);
  }

  // The first pair that helps.
  bool two(const Toggles& toggles, Found* best) {
    const AutoChoice from = best->choice;
    const std::vector<Toggle> all = toggles(from);
    for (size_t i = 0; i < all.size(); ++i) {
      for (size_t j = i + 1; j < all.size() && left_ > 0; ++j) {
        if (consider(from, {&all[i], &all[j]}, best)) return true;
      }
    }
    return false;
  }

  bool consider(const AutoChoice& from, const std::vector<const Toggle*>& toggles, Found* best) {
    AutoChoice choice = from;
    for (const Toggle* toggle : toggles) (*toggle)(choice);
    leave_out_remade(menu_, true, &choice);
    const Trial trial = measure(choice);
    if (!better(trial, best->trial)) return false;
    *best = {std::move(choice), trial};
    return true;
  }

  AutoBuilder& builder_;
  const MemoryMenu& menu_;
  int left_;
  std::vector<std::vector<Bytes>> limits_;  // by section
  std::map<std::string, Trial> known_;      // by key
  std::vector<Found> sets_;                 // of climb_sets, spelled out
};

}  // namespace

Found toggle_search(AutoBuilder& builder, const MemoryMenu& menu, const std::vector<Found>& starts,
                    int simulations) {
  ToggleSearch search(builder, menu, simulations);
  Found best = starts.front();
  const auto climb = [&](const AutoChoice& from) {
    Found found = search.climb(from);
    if (better(found.trial, best.trial)) best = std::move(found);
  };
  for (const Found& start : starts) climb(start.choice);
  const std::vector<AutoChoice> corners = search.corners();
  for (const AutoChoice& corner : corners) search.climb_sets(corner);
  for (const Found& each : search.best_sets()) climb(each.choice);
  for (const AutoChoice& corner : corners) climb(corner);
  return best;
}

}  // namespace deepcompile
