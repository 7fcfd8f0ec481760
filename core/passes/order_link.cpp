// SPDX-License-Identifier: Apache-2.0
#include "passes/order_link.h"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "ir/text.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

// Runs that a reduction waits for a gather behind them; reductions that an
// accumulation lets pass. What is tried, in this order.
constexpr int kRunsPassed[] = {0, 1, 2};
constexpr int kReductionsPassed[] = {1, 2, 4, 64};

using Instrs = std::vector<Instr>;

// Where each parameter's next wait or accumulate is, from each gather or
// reduce: its position, or the end.
std::vector<size_t> deadlines(const StepProgram& program, const Instrs& instrs) {
  std::vector<size_t> next_wait(program.params.size(), instrs.size());
  std::vector<size_t> next_accumulate = next_wait;
  std::vector<size_t> out(instrs.size(), instrs.size());
  for (size_t i = instrs.size(); i-- > 0;) {
    const Instr& instr = instrs[i];
    if (instr.op == Op::kWait) next_wait[index(*instr.param)] = i;
    if (instr.op == Op::kAccumulate) next_accumulate[index(*instr.param)] = i;
    if (instr.op == Op::kGather) out[i] = next_wait[index(*instr.param)];
    if (instr.op == Op::kReduce) out[i] = next_accumulate[index(*instr.param)];
  }
  return out;
}

// Reductions let gathers pass that stand up to `runs` runs behind them and are
// waited for sooner.
Instrs gathers_first(const StepProgram& program, const Instrs& instrs, int runs) {
  const std::vector<size_t> deadline = deadlines(program, instrs);
  std::vector<size_t> order;  // positions, as they stand in the end
  struct Held {
    size_t at;
    int runs;
  };
  std::vector<Held> held;  // reductions that wait
  // Whether a gather that is worth waiting for stands close behind.
  const auto worth_it = [&](size_t from, size_t reduce, int left) {
    for (size_t i = from; i < deadline[reduce]; ++i) {
      if (instrs[i].op == Op::kRun && left-- == 0) return false;
      if (instrs[i].op == Op::kGather) return deadline[i] < deadline[reduce];
    }
    return false;
  };
  const auto flush = [&](size_t next) {
    // In their order: those before one that goes have to go too.
    size_t last = 0;
    for (size_t h = 0; h < held.size(); ++h) {
      const bool due = deadline[held[h].at] <= next || !worth_it(next, held[h].at, held[h].runs);
      if (due) last = h + 1;
    }
    for (size_t h = 0; h < last; ++h) order.push_back(held[h].at);
    held.erase(held.begin(), held.begin() + static_cast<std::ptrdiff_t>(last));
  };
  for (size_t i = 0; i < instrs.size(); ++i) {
    flush(i);
    if (instrs[i].op == Op::kReduce) {
      held.push_back({i, runs});
      continue;
    }
    order.push_back(i);
    if (instrs[i].op == Op::kRun) {
      for (Held& each : held) --each.runs;
    }
  }
  for (const Held& each : held) order.push_back(each.at);
  Instrs out;
  out.reserve(instrs.size());
  for (size_t at : order) out.push_back(instrs[at]);
  return out;
}

// Each accumulation stands `passed` reductions later, but before an update of
// its parameter, and before the end.
Instrs accumulate_later(const StepProgram& program, const Instrs& instrs, int passed) {
  std::vector<size_t> next_update(program.params.size(), instrs.size());
  std::vector<size_t> until(instrs.size(), 0);  // of accumulations
  std::vector<size_t> reduces;                  // positions behind i, nearest last
  for (size_t i = instrs.size(); i-- > 0;) {
    if (instrs[i].op == Op::kReduce) reduces.push_back(i);
    if (instrs[i].op == Op::kUpdate) next_update[index(*instrs[i].param)] = i;
    if (instrs[i].op != Op::kAccumulate) continue;
    const auto far = static_cast<size_t>(passed);
    // Just before the reduction that stands one more away, so that as many
    // more are under way at once.
    const size_t to = reduces.size() > far ? reduces[reduces.size() - 1 - far] : instrs.size();
    until[i] = std::min(to, next_update[index(*instrs[i].param)]);
  }
  SectionEdit edit(instrs);
  for (size_t i = 0; i < instrs.size(); ++i) {
    if (instrs[i].op != Op::kAccumulate || until[i] <= i + 1) continue;
    edit.drop(i);
    edit.insert(until[i], instrs[i]);
  }
  return std::move(edit).apply();
}

// The longest of the updates before the first gather, and its parameter's gather, stand behind the
// last gather before the first run. The section as it is where there is nothing to move, or
// something else is done to the parameter before: waiting for it, or moving its states.
Instrs longest_update_later(const StepProgram& program, const Instrs& instrs) {
  const auto first_of = [&](Op op) {
    const auto found = std::find_if(instrs.begin(), instrs.end(),
                                    [&](const Instr& instr) { return instr.op == op; });
    return static_cast<size_t>(found - instrs.begin());
  };
  const size_t run = first_of(Op::kRun), first_gather = first_of(Op::kGather);
  const auto numel = [&](size_t at) { return program.param(*instrs[at].param).numel; };
  size_t update = run;
  for (size_t i = 0; i < std::min(first_gather, run); ++i) {
    if (instrs[i].op != Op::kUpdate) continue;
    if (update == run || numel(i) > numel(update)) update = i;
  }
  if (update == run) return instrs;
  size_t gather = run, last = run;
  for (size_t i = first_gather; i < run; ++i) {
    if (instrs[i].op != Op::kGather) continue;
    last = i;
    if (instrs[i].param == instrs[update].param) gather = i;
  }
  if (gather == run || last == gather) return instrs;
  const auto end = instrs.begin() + static_cast<std::ptrdiff_t>(last);
  const auto concerns_it = [&](const Instr& instr) { return instr.param == instrs[update].param; };
  if (std::count_if(instrs.begin(), end, concerns_it) > 2) return instrs;
  SectionEdit edit(instrs);
  for (const size_t at : {update, gather}) {
    edit.drop(at);
    edit.insert(last + 1, instrs[at]);
  }
  return std::move(edit).apply();
}

bool has_reductions(const Section& section) {
  return std::any_of(section.instrs.begin(), section.instrs.end(),
                     [](const Instr& instr) { return instr.op == Op::kReduce; });
}

class Orderer {
 public:
  Orderer(StepProgram& program, PassContext& context, int simulations)
      : program_(program), context_(context), left_(simulations) {}

  void run() {
    const PassEnvironment& environment = context_.environment();
    best_ = environment.simulate(program_);
    const Nanos before = best_.time;
    for (size_t s = 0; s < program_.sections.size(); ++s) {
      const Section& section = program_.sections[s];
      if (has_reductions(section)) improve(s);
      if (section.kind != SectionKind::kForward) continue;
      const std::string name = section_name(section);
      attempt(s, longest_update_later(program_, section.instrs),
              name + ": the longest of the first updates, and its gather, come later");
    }
    if (best_.time == before) {
      return context_.because("unchanged: no order tried shortens the step of " + pretty(before));
    }
    context_.because("step " + pretty(before) + " -> " + pretty(best_.time) + ", peak " +
                     pretty(best_.peak));
  }

 private:
  void improve(size_t s) {
    const std::string name = section_name(program_.sections[s]);
    for (const int runs : kRunsPassed) {
      attempt(s, gathers_first(program_, program_.sections[s].instrs, runs),
              name + ": gathers pass reductions that are waited for later, " +
                  std::to_string(runs) + " runs behind them at most");
    }
    for (const int passed : kReductionsPassed) {
      attempt(s, accumulate_later(program_, program_.sections[s].instrs, passed),
              name + ": accumulations wait for " + std::to_string(passed) +
                  " more reductions to be issued");
    }
  }

  // Keeps the section's new instructions if the step is faster and fits.
  void attempt(size_t s, Instrs instrs, const std::string& what) {
    Instrs& now = program_.sections[s].instrs;
    if (left_ <= 0 || instrs == now) return;
    --left_;
    std::swap(now, instrs);
    const SimSummary after = context_.environment().simulate(program_);
    const auto budget = context_.environment().memory_budget;
    if (after.time >= best_.time || (budget && after.peak > *budget)) {
      std::swap(now, instrs);
      return;
    }
    context_.because(what + ": saves " + pretty(best_.time - after.time));
    best_ = after;
  }

  StepProgram& program_;
  PassContext& context_;
  int left_;
  SimSummary best_{};
};

}  // namespace

void OrderLink::run(StepProgram& program, PassContext& context) const {
  if (context.environment().simulator == nullptr) {
    return context.because("unchanged: without a machine to simulate, orders cannot be compared");
  }
  Orderer(program, context, options_.simulations).run();
}

}  // namespace deepcompile
