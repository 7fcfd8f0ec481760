// SPDX-License-Identifier: Apache-2.0
#include "critical_path.h"

#include <algorithm>
#include <optional>
#include <utility>

namespace deepcompile {
namespace {

// When something is ready, and the instruction that made it so.
struct Ready {
  Nanos time;
  std::optional<size_t> by;  // index of a Node
};

class PathFinder {
 public:
  PathFinder(const StepProgram& program, const InstrTime& time)
      : program_(program),
        time_(time),
        params_(program.params.size()),
        made_(program.values.size()),
        moved_(program.values.size()) {
    for (size_t i = 0; i < params_.size(); ++i) {
      params_[i].stale = program.params[i].placement == Placement::kSharded;
    }
    for (const Section& section : program.sections) {
      for (const Instr& instr : section.instrs) foreign_gradients_ &= instr.op != Op::kReduce;
    }
  }

  CriticalPath find() {
    walk();        // finds what a step leaves behind
    start_over();  // and this is the step that counts
    walk();
    return trace_back();
  }

 private:
  struct Node {
    InstrAt at;
    Nanos end;
    std::optional<size_t> after;  // what it waited for last
  };

  struct ParamState {
    Ready whole, shard, reduced, states;
    bool stale = false;  // a gather has work to do
    bool gradient = false;
    bool deferred = false;
    bool leaving = false, on_host = false;  // its states
  };

  void walk() {
    for (size_t s = 0; s < program_.sections.size(); ++s) {
      section_ = &program_.sections[s];
      for (size_t i = 0; i < section_->instrs.size(); ++i) {
        at_ = {static_cast<uint32_t>(s), static_cast<uint32_t>(i)};
        step(section_->instrs[i]);
      }
    }
  }

  void start_over() {
    for (ParamState& s : params_) s.whole = s.shard = s.reduced = s.states = Ready{};
    std::fill(made_.begin(), made_.end(), Ready{});
    std::fill(moved_.begin(), moved_.end(), Ready{});
    compute_ = Ready{};
    nodes_.clear();
  }

  void step(const Instr& instr) {
    switch (instr.op) {
      case Op::kGather:
        return gather(instr);
      case Op::kWait:
        compute_ = later(compute_, state(instr).whole);
        return;
      case Op::kRelease:
        state(instr).stale = true;
        return;
      case Op::kReduce: {
        Ready gradients;
        for (ValueId id : instr.values) gradients = later(gradients, made_[index(id)]);
        state(instr).reduced = start(instr, gradients);
        return;
      }
      case Op::kAccumulate:
        state(instr).gradient = true;
        compute_ = start(instr, later(compute_, state(instr).reduced));
        return;
      case Op::kRun:
        compute_ = start(instr, compute_);
        for (ValueId id : program_.region(*instr.region).outputs) made_[index(id)] = compute_;
        return;
      case Op::kNorm:
        compute_ = start(instr, compute_);
        return;
      case Op::kUpdate:
        return update(instr);
      case Op::kDefer:
        state(instr).deferred = state(instr).gradient;
        return;
      default:
        return move(instr);
    }
  }

  void gather(const Instr& instr) {
    ParamState& s = state(instr);
    if (s.deferred) apply_update(instr);
    if (!std::exchange(s.stale, false)) return;
    s.whole = start(instr, s.shard);
  }

  void update(const Instr& instr) {
    const ParamState& s = state(instr);
    const bool late = section_->kind == SectionKind::kForward;
    if (late ? s.deferred : s.gradient || foreign_gradients_) apply_update(instr);
  }

  void apply_update(const Instr& instr) {
    ParamState& s = state(instr);
    if (std::exchange(s.on_host, false)) {
      s.states = start({Op::kReloadStates, instr.param, std::nullopt, {}}, s.states);
    }
    compute_ = start({Op::kUpdate, instr.param, std::nullopt, {}}, later(compute_, s.states));
    s.shard = s.states = compute_;
    s.gradient = s.deferred = false;
    if (program_.param(*instr.param).placement != Placement::kReplicated) s.stale = true;
  }

  // Copies to the host and back.
  void move(const Instr& instr) {
    if (!instr.param) return move_values(instr);
    ParamState& s = state(instr);
    if (instr.op == Op::kOffloadStates && !s.on_host) {
      s.states = start(instr, s.states);
      s.leaving = true;
    }
    if (instr.op == Op::kReloadStates && std::exchange(s.on_host, false)) {
      s.states = start(instr, s.states);
    }
    if (instr.op == Op::kEvictStates && std::exchange(s.leaving, false)) s.on_host = true;
    const bool waits = instr.op == Op::kEvictStates || instr.op == Op::kAwaitStates;
    if (waits) compute_ = later(compute_, s.states);
  }

  void move_values(const Instr& instr) {
    const bool waits = instr.op == Op::kEvict || instr.op == Op::kAwait;
    Ready ready;
    for (ValueId id : instr.values) {
      if (instr.op == Op::kOffload) moved_[index(id)] = made_[index(id)];
      ready = later(ready, moved_[index(id)]);
    }
    if (waits) {
      compute_ = later(compute_, ready);
      return;
    }
    ready = start(instr, ready);
    for (ValueId id : instr.values) moved_[index(id)] = ready;
  }

  ParamState& state(const Instr& instr) { return params_[index(*instr.param)]; }

  Ready start(const Instr& instr, const Ready& after) {
    nodes_.push_back({at_, after.time + time_(*section_, instr), after.by});
    return {nodes_.back().end, nodes_.size() - 1};
  }

  static Ready later(const Ready& a, const Ready& b) { return b.time > a.time ? b : a; }

  CriticalPath trace_back() const {
    CriticalPath out;
    const auto last = std::max_element(nodes_.begin(), nodes_.end(),
                                       [](const Node& a, const Node& b) { return a.end < b.end; });
    if (last == nodes_.end()) return out;
    out.length = last->end;
    std::optional<size_t> at = static_cast<size_t>(last - nodes_.begin());
    for (; at; at = nodes_[*at].after) out.instrs.push_back(nodes_[*at].at);
    std::reverse(out.instrs.begin(), out.instrs.end());
    return out;
  }

  const StepProgram& program_;
  const InstrTime& time_;
  bool foreign_gradients_ = true;  // the program reduces nothing: see StepMachine
  const Section* section_ = nullptr;
  InstrAt at_;
  std::vector<Node> nodes_;
  Ready compute_;
  std::vector<ParamState> params_;
  std::vector<Ready> made_, moved_;  // by value: computed; copied out or in
};

}  // namespace

CriticalPath critical_path(const StepProgram& program, const InstrTime& time) {
  return PathFinder(program, time).find();
}

}  // namespace deepcompile
