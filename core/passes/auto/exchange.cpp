// SPDX-License-Identifier: Apache-2.0
#include "passes/auto/exchange.h"

#include <algorithm>
#include <optional>
#include <utility>

namespace deepcompile {
namespace {

// Parts, of all that a choice frees, that one exchange is about.
constexpr double kExchanged[] = {0.4, 0.15, 0.05};
// As much is given back as is freed elsewhere, or less where that does not fit.
constexpr double kReturned[] = {1, 0.5};
// Parts of what is freed in one way that are given back: first these; then, of the best of them,
// so many times as much.
const std::vector<double> kParts = {0.5, 0.25, 0.125, 0.0625, 0.03125};
const std::vector<double> kTimes = {1.33, 1.67};
// Tries to give back what freeing more has made needless.
constexpr int kAfterMore = 16;
// Single ones that are tried side by side.
constexpr size_t kSingles = 4;

enum class Way : uint8_t { kRecompute, kStates, kValues };
constexpr Way kWays[] = {Way::kRecompute, Way::kStates, Way::kValues};

// What is freed together, by ids of the way's kind.
struct Item {
  std::vector<uint32_t> ids;
  Bytes bytes;
};

template <typename Id>
bool has(const std::vector<Id>& sorted, Id id) {
  return std::binary_search(sorted.begin(), sorted.end(), id);
}

// Calls ask(list) for the choice's list of that kind.
template <typename Choice, typename Ask>
void with_list(Choice& choice, Way way, const Ask& ask) {
  switch (way) {
    case Way::kRecompute:
      return ask(choice.recompute);
    case Way::kStates:
      return ask(choice.offload_states);
    case Way::kValues:
      return ask(choice.offload_values);
  }
}

std::vector<Item> offered(const MemoryMenu& menu, const AutoChoice& choice, Way way) {
  std::vector<Item> out;
  if (way == Way::kRecompute) {
    for (const RecomputeUnit& unit : menu.recompute()) {
      out.push_back({{}, unit.saved});
      for (const RegionId id : unit.regions)
        out.back().ids.push_back(static_cast<uint32_t>(index(id)));
    }
    return out;
  }
  const bool states = way == Way::kStates;
  for (const Movable& each : states ? menu.states() : menu.values(choice.recompute, true)) {
    out.push_back({{each.id}, each.bytes});
  }
  return out;
}

// What of the menu is chosen, or is not, in its order.
std::vector<Item> items(const MemoryMenu& menu, const AutoChoice& choice, Way way, bool chosen) {
  std::vector<Item> out = offered(menu, choice, way);
  with_list(choice, way, [&](const auto& list) {
    using Id = typename std::decay_t<decltype(list)>::value_type;
    for (Item& item : out) {
      std::erase_if(item.ids, [&](uint32_t id) { return has(list, Id{id}) != chosen; });
    }
  });
  std::erase_if(out, [](const Item& item) { return item.ids.empty(); });
  return out;
}

Bytes sum(const std::vector<Item>& items) {
  Bytes out;
  for (const Item& item : items) out += item.bytes;
  return out;
}

Bytes freed_by(const MemoryMenu& menu, const AutoChoice& choice) {
  Bytes out;
  for (const Way way : kWays) out += sum(items(menu, choice, way, true));
  return out;
}

// The first, or the last, of so many bytes together; those that are larger are left out.
template <typename Iterator>
std::vector<uint32_t> some(Iterator from, Iterator to, Bytes bytes) {
  std::vector<uint32_t> ids;
  for (; from != to; ++from) {
    if (from->bytes > bytes) continue;
    bytes -= from->bytes;
    ids.insert(ids.end(), from->ids.begin(), from->ids.end());
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

AutoChoice with(const MemoryMenu& menu, AutoChoice choice, Way way,
                const std::vector<uint32_t>& ids) {
  with_list(choice, way, [&](auto& list) {
    using Id = typename std::decay_t<decltype(list)>::value_type;
    for (const uint32_t id : ids) list.push_back(Id{id});
    std::sort(list.begin(), list.end());
  });
  leave_out_remade(menu, true, &choice);
  return choice;
}

AutoChoice without(const MemoryMenu& menu, AutoChoice choice, Way way,
                   const std::vector<uint32_t>& ids) {
  with_list(choice, way, [&](auto& list) {
    std::erase_if(list, [&](auto id) { return has(ids, static_cast<uint32_t>(index(id))); });
  });
  leave_out_remade(menu, true, &choice);
  return choice;
}

struct Exchange {
  Way more, less;
  Bytes bytes;
};

// All that have something to give back, large ones first.
std::vector<Exchange> exchanges(const MemoryMenu& menu, const AutoChoice& choice) {
  const Bytes freed = freed_by(menu, choice);
  std::vector<Exchange> out;
  for (const double part : kExchanged) {
    for (const Way less : kWays) {
      if (items(menu, choice, less, true).empty()) continue;
      for (const Way more : kWays) {
        if (more != less) out.push_back({more, less, part_of(freed, part)});
      }
    }
  }
  return out;
}

std::optional<Found> measured(AutoBuilder& builder, AutoChoice choice) {
  if (builder.peak_of_memory_choices(choice) > builder.budget()) return std::nullopt;
  const Trial trial = builder.measure(choice);
  if (!trial.fits) return std::nullopt;
  return Found{std::move(choice), trial};
}

// The choice after the exchange, if one fits.
std::optional<Found> after(AutoBuilder& builder, const MemoryMenu& menu, const AutoChoice& from,
                           const Exchange& exchange) {
  const std::vector<Item> free = items(menu, from, exchange.more, false);
  const std::vector<uint32_t> ids = some(free.begin(), free.end(), exchange.bytes);
  if (ids.empty()) return std::nullopt;
  const AutoChoice more = with(menu, from, exchange.more, ids);
  const std::vector<Item> taken = items(menu, more, exchange.less, true);
  for (const double part : kReturned) {
    const std::vector<uint32_t> less =
        some(taken.rbegin(), taken.rend(), part_of(exchange.bytes, part));
    if (less.empty()) return std::nullopt;
    std::optional<Found> found = measured(builder, without(menu, more, exchange.less, less));
    if (found) return found;
  }
  return std::nullopt;
}

// Asks for so many answers, as far as trials are left, and takes the best of them if it is better
// than what there is. Which one it was.
template <typename Ask>
std::optional<size_t> take_best(Builders& builders, size_t count, const Ask& ask, int* trials,
                                Found* best) {
  count = std::min(count, static_cast<size_t>(*trials));
  *trials -= static_cast<int>(count);
  std::vector<std::optional<Found>> tried = builders.each(count, ask);
  std::optional<size_t> out;
  for (size_t i = 0; i < count; ++i) {
    if (!tried[i] || !better(tried[i]->trial, best->trial)) continue;
    *best = std::move(*tried[i]);
    out = i;
  }
  return out;
}

// Without the last items of the way's menu, as many as is best.
bool give_back(Builders& builders, const MemoryMenu& menu, Way way, int* trials, Found* best) {
  const AutoChoice from = best->choice;
  const std::vector<Item> all = items(menu, from, way, true);
  const Bytes total = sum(all);
  const auto try_parts = [&](const std::vector<double>& parts, double of) {
    std::vector<AutoChoice> choices;
    for (const double part : parts) {
      const std::vector<uint32_t> ids = some(all.rbegin(), all.rend(), part_of(total, part * of));
      AutoChoice choice = without(menu, from, way, ids);
      if (ids.empty() || (!choices.empty() && choice == choices.back())) break;
      choices.push_back(std::move(choice));
    }
    return take_best(
        builders, choices.size(),
        [&](AutoBuilder& builder, size_t i) { return measured(builder, choices[i]); }, trials,
        best);
  };
  const std::optional<size_t> found = try_parts(kParts, 1);
  if (!found) return false;
  try_parts(kTimes, kParts[*found]);
  return true;
}

}  // namespace

Found exchange_parts(Builders& builders, const MemoryMenu& menu, Found best, int trials) {
  for (bool again = true; again;) {
    const AutoChoice from = best.choice;
    const std::vector<Exchange> all = exchanges(menu, from);
    again = take_best(
                builders, all.size(),
                [&](AutoBuilder& builder, size_t i) { return after(builder, menu, from, all[i]); },
                &trials, &best)
                .has_value();
  }
  return best;
}

Found give_back_parts(Builders& builders, const MemoryMenu& menu, Found best, int trials) {
  for (bool again = true; again;) {
    again = false;
    for (const Way way : kWays) again = give_back(builders, menu, way, &trials, &best) || again;
  }
  return best;
}

Found free_more(Builders& builders, const MemoryMenu& menu, Found best, int rounds) {
  for (bool again = true; again && rounds > 0; --rounds) {
    const AutoChoice from = best.choice;
    const Bytes freed = freed_by(menu, from);
    int trials = std::size(kExchanged) * std::size(kWays);
    const auto ask = [&](AutoBuilder& builder, size_t i) -> std::optional<Found> {
      const Way way = kWays[i % std::size(kWays)];
      const std::vector<Item> free = items(menu, from, way, false);
      const Bytes bytes = part_of(freed, kExchanged[i / std::size(kWays)]);
      const std::vector<uint32_t> ids = some(free.begin(), free.end(), bytes);
      if (ids.empty()) return std::nullopt;
      std::optional<Found> more = measured(builder, with(menu, from, way, ids));
      if (!more) return std::nullopt;
      Builders alone = builders.alone(builder);
      return give_back_parts(alone, menu, std::move(*more), kAfterMore);
    };
    again = take_best(builders, static_cast<size_t>(trials), ask, &trials, &best).has_value();
  }
  return best;
}

Found give_back_singly(Builders& builders, const MemoryMenu& menu, Found best, int trials) {
  for (bool again = true; again;) {
    again = false;
    for (const Way way : kWays) {
      const std::vector<Item> all = items(menu, best.choice, way, true);
      for (size_t end = all.size(); end > 0;) {
        const AutoChoice from = best.choice;
        const size_t count = std::min(kSingles, end);
        const auto ask = [&](AutoBuilder& builder, size_t i) {
          return measured(builder, without(menu, from, way, all[end - 1 - i].ids));
        };
        again = take_best(builders, count, ask, &trials, &best) || again;
        end -= count;
      }
    }
  }
  return best;
}

}  // namespace deepcompile
