// SPDX-License-Identifier: Apache-2.0
#include "passes/auto/plan.h"

#include <algorithm>
#include <atomic>
#include <future>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "passes/auto/exchange.h"
#include "passes/auto/held_plan.h"
#include "passes/auto/read_choice.h"
#include "passes/auto/search.h"
#include "passes/placement.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

// Tries after the levels, by auto_exchange.h, simulations of order_link, and whether everything run
// again is another start.
struct Effort {
  int exchanges, parts, rounds, singles, orders;
  bool all_again;
};

// Programs with no more forward runs, and no more instructions, are searched
// region by region.
constexpr size_t kSmallRuns = 12;
constexpr size_t kSmallInstrs = 400;
// Simulations of order_link: for small programs, and for others.
constexpr int kOrderSmall = 16, kOrderLarge = 4;
// Where simulations are plenty, and where they are not.
constexpr Effort kMuch{120, 48, 3, 48, kOrderLarge, true};
constexpr Effort kLittle{36, 12, 0, 0, kOrderLarge, true};
// The same when a plan is made again, in less time: the one that holds was found with more. Where
// simulations are not plenty and that one fits, it is enough.
constexpr Effort kMuchAgain{120, 48, 0, 48, kOrderLarge, true};
constexpr Effort kLittleAgain{12, 7, 0, 0, kOrderLarge, false};
constexpr Effort kOrderOnly{0, 0, 0, 0, kOrderLarge, false};
// Where single toggles were tried.
constexpr Effort kToggled{0, 0, 0, 48, kOrderSmall, true};
// Parts of the budget left to it by what is kept: the last only where the one before helped.
constexpr double kRoomToOrder[] = {0, 0.08, 0.03};
// Less of a step than one in so many is not worth moving or computing anything again.
constexpr int64_t kWorth = 1000;
// What instructions that start together spare the host and the kernels is not
// simulated; it is taken to be worth one part in so many of a step.
constexpr int64_t kTogether = 500;

size_t count_forward_runs(const StepProgram& plain) {
  size_t count = 0;
  for (const Section& section : plain.sections) {
    if (section.kind == SectionKind::kForward) count += section.instrs.size();
  }
  return count;
}

void check(const StepProgram& program, const PassEnvironment& environment) {
  check_compute_only(program, "auto");
  if (environment.estimator == nullptr || environment.simulator == nullptr) {
    throw UserError(
        "[passes] auto: plans by simulated time, and has no machine to simulate. Give it one.");
  }
}

[[noreturn]] void fail_budget(const Found& classical, const Found& smallest, Bytes budget) {
  throw UserError(
      "[passes] auto: no plan fits the memory budget of " + pretty(budget) +
      ": the plain plan needs " + pretty(classical.trial.peak) +
      ", and the smallest peak found is " + pretty(smallest.trial.peak) + " (" +
      describe(smallest.choice) + "), " + pretty(smallest.trial.peak - budget) +
      " too much. Raise memory_budget, shard over more ranks, or use a smaller batch or sequence.");
}

// Whether what can start together should, in a plan that is otherwise finished.
bool worth_coalescing(const Trial& trial, const Found& classical, const Found& best) {
  if (!trial.fits || (classical.trial.fits && trial.time > classical.trial.time)) return false;
  const int64_t more = trial.time.value - best.trial.time.value;
  return better(trial, best.trial) ||
         (!best.choice.coalesce && more * kTogether <= best.trial.time.value);
}

// Ordering the link takes memory too, for more reductions under way: parameters
// that are kept whole may have to leave it some.
Found order(AutoBuilder& builder, const AutoChoice& unordered, int simulations,
            const Found& classical, Found best) {
  const bool by_worth = !unordered.keep && builder.environment().memory_budget;
  for (const double part : kRoomToOrder) {
    const Nanos before = best.trial.time;
    AutoChoice ordered = unordered;
    ordered.order_simulations = simulations;
    ordered.reserve += part_of(builder.budget(), part);
    ordered.coalesce = true;
    const Trial together = builder.measure(ordered);
    if (worth_coalescing(together, classical, best)) {
      best = {std::move(ordered), together};
    } else if (!best.choice.coalesce) {
      ordered.coalesce = false;
      const Trial trial = builder.measure(ordered);
      if (better(trial, best.trial)) best = {std::move(ordered), trial};
    }
    if (!by_worth || (part > 0 && best.trial.time >= before)) break;
  }
  return best;
}

// What is moved or run again for next to nothing is not: not all that it costs
// is simulated.
void leave_out_idle(AutoBuilder& builder, Found* best) {
  const auto without = [&](auto AutoChoice::*set) {
    if ((best->choice.*set).empty()) return;
    AutoChoice choice = best->choice;
    (choice.*set).clear();
    if (builder.peak_of_memory_choices(choice) > builder.budget()) return;
    const Trial trial = builder.measure(choice);
    const int64_t more = trial.time.value - best->trial.time.value;
    if (trial.fits && more * kWorth <= best->trial.time.value) *best = {std::move(choice), trial};
  };
  without(&AutoChoice::offload_states);
  without(&AutoChoice::offload_values);
  without(&AutoChoice::recompute);
}

// Plans that are not faster than the classical one are not worth their memory.
void prefer_classical(const Found& classical, Found* best) {
  if (!classical.trial.fits || classical.trial.time > best->trial.time) return;
  *best = classical;
}

// The plan that holds, what it comes to today, and what its choice does, made again: its copies may
// stand elsewhere by these costs.
struct HeldTrials {
  StepProgram plan;
  Trial as_it_is;
  Found again;
};

std::optional<HeldTrials> try_held(AutoBuilder& builder, const StepProgram& plain) {
  std::optional<StepProgram> plan = held_plan(builder, plain);
  if (!plan) return std::nullopt;
  HeldTrials out{std::move(*plan), {}, {}};
  out.as_it_is = builder.measure_plan(out.plan);
  out.again.choice = read_choice(builder, out.plan);
  out.again.trial = builder.measure(out.again.choice);
  return out;
}

// The best choice that a search found, and what the classical plan comes to.
struct Searched {
  Found best, classical;
};

// One planning: its questions that have nothing to do with each other are asked side by side, each
// of a builder of its own.
class Planning {
 public:
  // `simulations`: of each search; 0: by the program's size.
  Planning(const StepProgram& plain, const PassEnvironment& environment, int simulations)
      : plain_(plain),
        environment_(environment),
        late_(environment),
        most_(simulations),
        builder_(plain, environment) {
    late_.early_updates = false;
    if (environment.held == nullptr) return;
    held_ = beside(environment_, [&](AutoBuilder& other) { return try_held(other, plain_); });
  }

  AutoBuilder& builder() { return builder_; }
  int simulated() const { return beside_ + builder_.simulations(); }

  // Where updates may be in the backward, with them there, and beside it without.
  Searched search() {
    std::future<Searched> late;
    if (builder_.early_updates()) {
      late = beside(late_, [&](AutoBuilder& other) { return search_with(other, late_); });
    }
    Searched out = search_with(builder_, environment_);
    if (!late.valid()) return out;
    Searched other = late.get();
    if (better(other.best.trial, out.best.trial)) out.best = std::move(other.best);
    return out;
  }

  // Null where none holds. Waits for its trials.
  const HeldTrials* held() const { return held_.valid() && held_.get() ? &*held_.get() : nullptr; }

 private:
  template <typename Ask>
  auto beside(const PassEnvironment& environment, Ask ask)
      -> std::future<decltype(ask(std::declval<AutoBuilder&>()))> {
    return std::async(std::launch::async, [this, &environment, ask] {
      AutoBuilder builder(plain_, environment);
      auto answer = ask(builder);
      beside_ += builder.simulations();
      return answer;
    });
  }

  Searched search_with(AutoBuilder& builder, const PassEnvironment& environment) {
    const int most = most_ > 0 ? most_ : simulations_for(builder.classical());
    const MemoryMenu menu(builder.classical(), *builder.environment().estimator);
    Builders builders(builder, plain_, environment);
    LevelSearch levels(builders, menu, most);
    Searched out;
    out.best = levels.run();
    out.classical = levels.classical();
    const bool small = count_forward_runs(plain_) <= kSmallRuns &&
                       count_instrs(builder.classical()) <= kSmallInstrs;
    if (small) {
      const int left = most - builder.simulations() - builders.simulations();
      out.best = toggle_search(builder, menu, {out.best, out.classical}, left);
    }
    if (out.best.trial.fits) {
      const Effort effort = small ? kToggled : effort_for(most);
      out.best = finish(builders, menu, environment, levels.all_again(), effort, out);
    }
    beside_ += builders.simulations();
    return out;
  }

  Effort effort_for(int simulations) const {
    const bool plenty = simulations > kPlenty;
    if (environment_.held == nullptr) return plenty ? kMuch : kLittle;
    if (plenty) return kMuchAgain;
    const HeldTrials* held = this->held();
    const bool fits = held != nullptr && (held->again.trial.fits || held->as_it_is.fits);
    return fits ? kOrderOnly : kLittleAgain;
  }

  // The best of `start` and what exchanges make of it, with the link in order: what is shorter
  // before that need not be after it.
  static Found finished(Builders& builders, const MemoryMenu& menu, const Effort& effort,
                        const Found& classical, const Found& start) {
    const auto ordered = [&](const AutoChoice& choice, Found best) {
      return order(builders.first(), choice, effort.orders, classical, std::move(best));
    };
    Found best = ordered(start.choice, start);
    if (!start.trial.fits) return best;
    Found other = exchange_parts(builders, menu, start, effort.exchanges);
    other = give_back_parts(builders, menu, std::move(other), effort.parts);
    other = free_more(builders, menu, std::move(other), effort.rounds);
    if (other.choice == start.choice) return best;
    if (better(other.trial, best.trial)) best = other;
    return ordered(other.choice, std::move(best));
  }

  // From what the levels found, and from everything run again.
  Found finish(Builders& builders, const MemoryMenu& menu, const PassEnvironment& environment,
               const std::optional<AutoChoice>& all_again, const Effort& effort,
               const Searched& found) {
    std::future<Found> again;
    if (all_again && effort.all_again) {
      again = beside(environment, [&](AutoBuilder& other) {
        Builders alone = builders.alone(other);
        const Found start{*all_again, other.measure(*all_again)};
        return finished(alone, menu, effort, found.classical, start);
      });
    }
    Found best = finished(builders, menu, effort, found.classical, found.best);
    if (again.valid()) {
      Found other = again.get();
      if (better(other.trial, best.trial)) best = std::move(other);
    }
    leave_out_idle(builders.first(), &best);
    return give_back_singly(builders, menu, std::move(best), effort.singles);
  }

  const StepProgram& plain_;
  const PassEnvironment& environment_;
  PassEnvironment late_;  // without updates in the backward
  int most_;
  AutoBuilder builder_;
  std::atomic<int> beside_ = 0;  // simulations of other builders
  std::shared_future<std::optional<HeldTrials>> held_;
};

void explain_step(const Planning& planning, const Found& classical, const Trial& best,
                  PassContext& context) {
  const auto& budget = context.environment().memory_budget;
  std::string text = "step " + pretty(classical.trial.time) + " -> " + pretty(best.time) +
                     ", peak " + pretty(classical.trial.peak) + " -> " + pretty(best.peak);
  if (budget) text += " of " + pretty(*budget);
  if (!classical.trial.fits) text += "; the plain plan does not fit the budget";
  context.because(text + "; " + std::to_string(planning.simulated()) + " plans simulated");
}

}  // namespace

Contract AutoPlan::contract() const {
  return {.needs = {},
          .provides = {Fact::kGathersPlaced, Fact::kReductionsPlaced, Fact::kUpdatesPlaced},
          .conflicts = {Fact::kGathersPlaced, Fact::kReductionsPlaced, Fact::kUpdatesPlaced}};
}

void AutoPlan::run(StepProgram& program, PassContext& context) const {
  check(program, context.environment());
  Planning planning(program, context.environment(), options_.simulations);
  AutoBuilder& builder = planning.builder();
  auto [best, classical] = planning.search();
  const HeldTrials* held = planning.held();
  if (held != nullptr && better(held->again.trial, best.trial)) best = held->again;
  if (best.trial.fits) prefer_classical(classical, &best);
  if (held != nullptr && held->as_it_is.fits && !better(best.trial, held->as_it_is)) {
    explain_step(planning, classical, held->as_it_is, context);
    stay_with(held->plan, context, &program);
    return;
  }
  if (!best.trial.fits) fail_budget(classical, best, builder.budget());
  explain_step(planning, classical, best.trial, context);
  context.because("chosen: " + classical_pass(builder.classical()) + ", " + describe(best.choice));
  context.because(print_levels(best.choice));
  builder.apply(best.choice, program);
}

}  // namespace deepcompile
