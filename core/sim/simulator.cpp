// SPDX-License-Identifier: Apache-2.0
#include "sim/simulator.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "analysis/footprint.h"
#include "analysis/liveness.h"
#include "base/error.h"
#include "ir/verifier.h"
#include "sim/memory_curve.h"

namespace deepcompile {
namespace {

struct Span {
  Nanos start, end;
};

// The two queues. Transfers are issued in compute order, so whatever overlaps
// a kernel is known when the kernel is placed.
class Clock {
 public:
  explicit Clock(double slowdown) : slowdown_(slowdown) {
    DC_CHECK(slowdown >= 1, "transfers cannot speed kernels up");
  }

  Nanos now() const { return now_; }
  Nanos end() const { return std::max(now_, link_free_); }

  Span transfer(Nanos duration) {
    const Nanos start = std::max(now_, link_free_);
    link_free_ = start + duration;
    if (duration.value > 0) busy_.push_back({start, link_free_});
    return {start, link_free_};
  }

  // Returns how long compute stands still.
  Nanos wait_until(Nanos time) {
    const Nanos stall = std::max(Nanos{0}, time - now_);
    now_ += stall;
    return stall;
  }

  // Runs a kernel of this undisturbed duration, stretched beside transfers.
  Span kernel(Nanos duration) {
    const Nanos start = now_;
    double left = static_cast<double>(duration.value);
    while (left > 0) {
      while (next_ < busy_.size() && busy_[next_].end <= now_) ++next_;
      if (next_ == busy_.size()) {
        now_ += Nanos{std::llround(left)};
        break;
      }
      const Span& span = busy_[next_];
      const bool beside = span.start <= now_;
      const double rate = beside ? slowdown_ : 1;  // time per unit of work
      const Nanos limit = (beside ? span.end : span.start) - now_;
      if (left * rate <= static_cast<double>(limit.value)) {
        now_ += Nanos{std::llround(left * rate)};
        break;
      }
      now_ += limit;
      left -= static_cast<double>(limit.value) / rate;
    }
    return {start, now_};
  }

 private:
  double slowdown_;
  Nanos now_;
  Nanos link_free_;
  std::vector<Span> busy_;  // transfers in time order
  size_t next_ = 0;         // first of them that ends after now_
};

std::vector<ParamFootprint> all_footprints(const StepProgram& program) {
  std::vector<ParamFootprint> footprints;
  for (size_t i = 0; i < program.params.size(); ++i) {
    footprints.push_back(footprint(program, ParamId{static_cast<uint32_t>(i)}));
  }
  return footprints;
}

class Simulation {
 public:
  Simulation(const StepProgram& program, const Estimator& estimator)
      : program_(program),
        estimator_(estimator),
        liveness_(analyze_liveness(program)),
        clock_(estimator.compute_slowdown(program)),
        footprints_(all_footprints(program)),
        memory_(resident()),
        params_(program.params.size()),
        alive_(program.values.size(), false) {
    for (size_t i = 0; i < params_.size(); ++i) {
      if (program.params[i].placement != Placement::kSharded) params_[i].whole_at = Nanos{0};
    }
  }

  SimResult run() {
    for (micro_step_ = 0; micro_step_ < program_.accumulation; ++micro_step_) {
      run_sections([](SectionKind kind) { return kind != SectionKind::kUpdate; });
    }
    micro_step_ = 0;
    run_sections([](SectionKind kind) { return kind == SectionKind::kUpdate; });
    return finish();
  }

 private:
  struct ParamState {
    std::optional<Nanos> whole_at;  // when the full buffer is, or was, valid; none if stale
    bool allocated = false;         // the full buffer of a sharded parameter
    std::optional<Nanos> reduced_at;
    bool has_gradient = false;
  };

  template <typename Wanted>
  void run_sections(Wanted wanted) {
    for (size_t s = 0; s < program_.sections.size(); ++s) {
      if (!wanted(program_.sections[s].kind)) continue;
      for (ValueId value : program_.sections[s].inputs) define(value);
      for (size_t i = 0; i < program_.sections[s].instrs.size(); ++i) step(s, i);
      hand_over(s);
    }
  }

  void step(size_t section, size_t position) {
    const Instr& instr = program_.sections[section].instrs[position];
    SimItem item;
    item.section = static_cast<uint32_t>(section);
    item.instr = static_cast<uint32_t>(position);
    item.micro_step = static_cast<uint32_t>(micro_step_);
    item.issue = item.start = item.end = clock_.now();
    execute(instr, item);
    for (ValueId value : liveness_.sections[section].frees[position]) drop(value);
    if (instr.op == Op::kReduce && reduces_in_place(instr)) allocate_staging(instr, item.issue);
    result_.stall += item.stall;
    result_.items.push_back(item);
  }

  void execute(const Instr& instr, SimItem& item) {
    switch (instr.op) {
      case Op::kGather:
        return gather(instr, item);
      case Op::kReduce:
        return reduce(instr, item);
      case Op::kRun:
        return run_region(instr, item);
      case Op::kNorm:
        return kernel(instr, item);
      case Op::kWait: {
        const auto whole_at = params_[index(*instr.param)].whole_at;
        DC_CHECK(whole_at.has_value(), "verified programs gather before they wait");
        item.stall = clock_.wait_until(*whole_at);
        item.end = clock_.now();
        return;
      }
      case Op::kRelease: {
        ParamState& state = params_[index(*instr.param)];
        state.whole_at.reset();
        if (std::exchange(state.allocated, false)) {
          memory_.free(clock_.now(), bytes_of(instr).gathered);
        }
        return;
      }
      case Op::kAccumulate:
        return accumulate(instr, item);
      case Op::kUpdate: {
        kernel(instr, item);
        ParamState& state = params_[index(*instr.param)];
        const Param& param = program_.param(*instr.param);
        if (param.placement != Placement::kReplicated) state.whole_at.reset();
        if (std::exchange(state.has_gradient, false)) {
          memory_.free(clock_.now(), bytes_of(instr).gradient);
        }
        return;
      }
    }
  }

  void gather(const Instr& instr, SimItem& item) {
    ParamState& state = params_[index(*instr.param)];
    if (state.whole_at) return;
    if (!std::exchange(state.allocated, true)) {
      memory_.allocate(clock_.now(), bytes_of(instr).gathered);
    }
    transfer(instr, item);
    state.whole_at = item.end;
  }

  void reduce(const Instr& instr, SimItem& item) {
    if (!reduces_in_place(instr)) allocate_staging(instr, item.issue);
    memory_.allocate(item.issue, bytes_of(instr).reduction_result);
    transfer(instr, item);
    params_[index(*instr.param)].reduced_at = item.end;
  }

  void accumulate(const Instr& instr, SimItem& item) {
    ParamState& state = params_[index(*instr.param)];
    DC_CHECK(state.reduced_at.has_value(), "verified programs reduce before they accumulate");
    item.stall = clock_.wait_until(*std::exchange(state.reduced_at, std::nullopt));
    // Without accumulation the reduction's result becomes the gradient.
    const bool adopts = program_.accumulation == 1;
    if (adopts) memory_.free(clock_.now(), bytes_of(instr).reduction_result);
    if (!std::exchange(state.has_gradient, true)) {
      memory_.allocate(clock_.now(), bytes_of(instr).gradient);
    }
    kernel(instr, item);
    memory_.free(clock_.now(), bytes_of(instr).reduction_input);
    if (!adopts) memory_.free(clock_.now(), bytes_of(instr).reduction_result);
  }

  void run_region(const Instr& instr, SimItem& item) {
    const Region& region = program_.region(*instr.region);
    const Nanos start = clock_.now();
    memory_.allocate(start, region.workspace);
    for (ValueId output : region.outputs) define(output);
    kernel(instr, item);
    memory_.free(clock_.now(), region.workspace);
  }

  void kernel(const Instr& instr, SimItem& item) {
    const Span span = clock_.kernel(estimator_.duration(program_, instr));
    item.resource = Resource::kCompute;
    item.start = span.start;
    item.end = span.end;
    result_.compute_busy += span.end - span.start;
  }

  void transfer(const Instr& instr, SimItem& item) {
    const Span span = clock_.transfer(estimator_.duration(program_, instr));
    item.resource = Resource::kLink;
    item.start = span.start;
    item.end = span.end;
    result_.link_busy += span.end - span.start;
  }

  // A value defined again (the next micro-step's loss) replaces the old one.
  void define(ValueId value) {
    drop(value);
    memory_.allocate(clock_.now(), program_.value(value).bytes);
    alive_[index(value)] = true;
  }

  void drop(ValueId value) {
    if (!alive_[index(value)]) return;
    memory_.free(clock_.now(), program_.value(value).bytes);
    alive_[index(value)] = false;
  }

  // Whether the transfer reads the gradient where it is; otherwise it is first
  // copied into a staging buffer, and for a moment both exist.
  bool reduces_in_place(const Instr& instr) const {
    return instr.values.size() == 1 &&
           program_.value(instr.values[0]).bytes == bytes_of(instr).reduction_input;
  }

  void allocate_staging(const Instr& instr, Nanos time) {
    memory_.allocate(time, bytes_of(instr).reduction_input);
  }

  // As the memory timeline has it: the caller keeps a forward's outputs until
  // its backward is over, others no longer than their section. Inputs that no
  // instruction could free, because there is none, go at once.
  void hand_over(size_t at) {
    const Section& section = program_.sections[at];
    const auto has = [](const std::vector<ValueId>& ids, ValueId id) {
      return std::find(ids.begin(), ids.end(), id) != ids.end();
    };
    for (ValueId id : section.inputs) {
      if (!has(section.outputs, id) && !has(liveness_.sections[at].saved, id)) drop(id);
    }
    const bool forward = section.kind == SectionKind::kForward;
    if (forward && program_.find_section(SectionKind::kBackward, section.graph)) return;
    for (ValueId id : section.outputs) drop(id);
    if (section.kind != SectionKind::kBackward) return;
    const auto its = program_.find_section(SectionKind::kForward, section.graph);
    for (ValueId id : program_.sections[index(*its)].outputs) drop(id);
  }

  const ParamFootprint& bytes_of(const Instr& instr) const {
    return footprints_[index(*instr.param)];
  }

  Bytes resident() const {
    Bytes total;
    for (const ParamFootprint& of : footprints_) total += of.resident();
    return total;
  }

  SimResult finish() {
    result_.time = clock_.end();
    result_.resident = resident();
    auto [peak, points] = std::move(memory_).finish();
    result_.peak = peak;
    result_.memory = std::move(points);
    return std::move(result_);
  }

  const StepProgram& program_;
  const Estimator& estimator_;
  Liveness liveness_;
  Clock clock_;
  std::vector<ParamFootprint> footprints_;  // by parameter
  MemoryCurve memory_;
  std::vector<ParamState> params_;
  std::vector<bool> alive_;  // by value
  int64_t micro_step_ = 0;
  SimResult result_;
};

}  // namespace

SimResult simulate(const StepProgram& program, const Estimator& estimator) {
  verify(program);
  return Simulation(program, estimator).run();
}

std::string instr_label(const StepProgram& program, const Instr& instr) {
  std::string label(traits(instr.op).name);
  if (instr.param) label += " " + program.param(*instr.param).name;
  if (instr.region) label += " " + program.region(*instr.region).name;
  return label;
}

}  // namespace deepcompile
