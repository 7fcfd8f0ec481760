// SPDX-License-Identifier: Apache-2.0
#include "sim/simulator.h"

#include <algorithm>
#include <array>
#include <utility>

#include "analysis/step_machine.h"
#include "base/error.h"
#include "cost/cached_costs.h"
#include "ir/verifier.h"
#include "sim/clock.h"
#include "sim/memory_curve.h"

namespace deepcompile {
namespace {

// A step that still differs from the one before it after this many is reported.
constexpr int kMostStepsRun = 4;

Bytes resident_of(const StepMachine& machine) {
  Bytes total;
  for (const ParamFootprint& of : machine.footprints()) total += of.resident();
  return total;
}

class Simulation final : public StepEvents {
 public:
  Simulation(const StepProgram& program, const Estimator& estimator, bool records)
      : program_(program),
        machine_(program),
        costs_(program, estimator),
        clock_(estimator.compute_slowdown(program), estimator.host_beside(program)),
        memory_(resident_of(machine_), records),
        done_(machine_.slots()),
        records_(records) {}

  // Steps until one starts and ends alike.
  SimResult run() {
    for (int step = 0; step < kMostStepsRun; ++step) {
      const Clock::Backlog before = clock_.backlog();
      const Nanos idle = clock_.end();
      begin_step();
      machine_.run(*this, program_.accumulation);
      // If a queue falls behind from step to step, it sets the pace.
      result_.time = std::max(clock_.now() - origin_, clock_.end() - idle);
      if (machine_.settled() && clock_.backlog() == before) break;
    }
    if (records_) report_copies();
    result_.peak = memory_.peak();
    result_.resident = memory_.start();
    result_.memory = memory_.take_points();
    return std::move(result_);
  }

  void begin_section(SectionKind kind) override {
    clock_.idle(costs_.section_overhead(program_, kind));
  }

  void begin(size_t section, size_t instr, int64_t micro_batch) override {
    if (!records_) return;
    item_ = SimItem{};
    item_.section = static_cast<uint32_t>(section);
    item_.instr = static_cast<uint32_t>(instr);
    item_.micro_step = static_cast<uint32_t>(micro_batch);
    item_.op = program_.sections[section].instrs[instr].op;
    item_.issue = item_.start = item_.end = clock_.now() - origin_;
  }

  void memory(MemoryPart, int64_t bytes) override { memory_.change(clock_.now(), bytes); }

  void kernel(Op op, const Instr& instr) override {
    const Nanos issue = clock_.now();
    const bool sum = op == Op::kReduce;  // on this rank alone
    const Span span = clock_.kernel(sum ? costs_.local_sum(program_, *instr.param)
                                        : costs_.duration(program_, op, instr));
    result_.compute_busy += span.end - span.start;
    // An accumulate's stall and kernel are one item: it is issued before both.
    if (records_) work(Resource::kCompute, op, issue, span);
  }

  // No item of its own: the reduction is issued once it is over.
  void stage(const Instr& instr) override {
    const Span span = clock_.kernel(costs_.staging(program_, *instr.param));
    result_.compute_busy += span.end - span.start;
  }

  void transfer(Resource queue, Op op, const Instr& instr) override {
    const Nanos issue = clock_.now();
    last_ = clock_.transfer(queue, costs_.duration(program_, op, instr));
    if (!records_) return;
    if (queue == Resource::kLink) {
      const Span span = clock_.span(last_);
      result_.link_busy += span.end - span.start;
      work(queue, op, issue, span);
    } else {
      work(queue, op, issue, {issue, issue});
      copies_.emplace_back(result_.items.size(), last_);
    }
  }

  void mark(TransferSlot slot) override { done_[slot] = last_; }

  void wait(TransferSlot slot) override {
    const Nanos stall = clock_.wait(done_[slot]);
    result_.stall += stall;
    if (!records_) return;
    item_.stall += stall;
    if (item_.resource == Resource::kNone) item_.end = clock_.now() - origin_;
  }

  void end() override {
    if (records_) result_.items.push_back(item_);
  }

 private:
  void begin_step() {
    std::vector<SimItem> items = std::move(result_.items);
    items.clear();
    result_ = SimResult{};
    result_.items = std::move(items);
    copies_.clear();
    origin_ = clock_.now();
    memory_.begin(origin_);
  }

  // Another piece of work of one instruction is another item.
  void work(Resource resource, Op op, Nanos issue, const Span& span) {
    if (item_.resource != Resource::kNone) {
      result_.items.push_back(item_);
      item_.issue = issue - origin_;
      item_.stall = Nanos{0};
    }
    item_.resource = resource;
    item_.op = op;
    item_.start = span.start - origin_;
    item_.end = span.end - origin_;
  }

  // When copies to and from the host ran is known now.
  void report_copies() {
    clock_.foresee();
    for (const auto& [at, ticket] : copies_) {
      const Span span = clock_.span(ticket);
      SimItem& item = result_.items[at];
      item.start = span.start - origin_;
      item.end = span.end - origin_;
      const bool out = ticket.queue == Resource::kToHost;
      (out ? result_.to_host_busy : result_.to_device_busy) += span.end - span.start;
    }
  }

  const StepProgram& program_;
  StepMachine machine_;
  CachedCosts costs_;
  Clock clock_;
  MemoryCurve memory_;
  std::vector<Clock::Ticket> done_;  // by slot: its last transfer
  bool records_;
  Nanos origin_;                                          // of the present step
  Clock::Ticket last_;                                    // transfer issued
  std::vector<std::pair<size_t, Clock::Ticket>> copies_;  // of this step, by item
  SimItem item_;
  SimResult result_;
};

}  // namespace

SimResult simulate(const StepProgram& program, const Estimator& estimator) {
  verify(program);
  return Simulation(program, estimator, true).run();
}

SimSummary simulate_summary(const StepProgram& program, const Estimator& estimator) {
  const SimResult result = Simulation(program, estimator, false).run();
  return {result.time, result.peak};
}

std::string instr_label(const StepProgram& program, const Instr& instr) {
  std::string label(traits(instr.op).name);
  if (instr.param) label += " " + program.param(*instr.param).name;
  if (instr.region) label += " " + program.region(*instr.region).name;
  if (instr.param || instr.values.empty()) return label;
  label += " " + program.value(instr.values.front()).name;
  const size_t more = instr.values.size() - 1;
  return more == 0 ? label : label + " and " + std::to_string(more) + " more";
}

std::string item_label(const StepProgram& program, const SimItem& item) {
  const Instr& instr = program.sections.at(item.section).instrs.at(item.instr);
  return instr_label(program, {item.op, instr.param, instr.region, instr.values});
}

}  // namespace deepcompile
