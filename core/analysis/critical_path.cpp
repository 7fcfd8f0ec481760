// SPDX-License-Identifier: Apache-2.0
#include "analysis/critical_path.h"

#include <algorithm>
#include <optional>

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
        whole_(program.params.size()),
        shard_(program.params.size()),
        reduced_(program.params.size()),
        stale_(program.params.size(), true),
        made_(program.values.size()) {
    for (size_t i = 0; i < stale_.size(); ++i) {
      stale_[i] = program.params[i].placement == Placement::kSharded;
    }
  }

  CriticalPath find() {
    for (size_t s = 0; s < program_.sections.size(); ++s) {
      const Section& section = program_.sections[s];
      for (size_t i = 0; i < section.instrs.size(); ++i) {
        at_ = {static_cast<uint32_t>(s), static_cast<uint32_t>(i)};
        step(section, section.instrs[i]);
      }
    }
    return trace_back();
  }

 private:
  struct Node {
    InstrAt at;
    Nanos end;
    std::optional<size_t> after;  // what it waited for last
  };

  void step(const Section& section, const Instr& instr) {
    switch (instr.op) {
      case Op::kGather: {
        const size_t p = index(*instr.param);
        if (!stale_[p]) return;
        stale_[p] = false;
        whole_[p] = start(section, instr, shard_[p]);
        return;
      }
      case Op::kWait:
        compute_ = later(compute_, whole_[index(*instr.param)]);
        return;
      case Op::kRelease:
        stale_[index(*instr.param)] = true;
        return;
      case Op::kReduce: {
        Ready gradients;
        for (ValueId id : instr.values) gradients = later(gradients, made_[index(id)]);
        reduced_[index(*instr.param)] = start(section, instr, gradients);
        return;
      }
      case Op::kAccumulate:
        compute_ = start(section, instr, later(compute_, reduced_[index(*instr.param)]));
        return;
      case Op::kRun:
        compute_ = start(section, instr, compute_);
        for (ValueId id : program_.region(*instr.region).outputs) made_[index(id)] = compute_;
        return;
      case Op::kNorm:
        compute_ = start(section, instr, compute_);
        return;
      case Op::kUpdate: {
        const size_t p = index(*instr.param);
        compute_ = start(section, instr, compute_);
        shard_[p] = compute_;
        if (program_.params[p].placement != Placement::kReplicated) stale_[p] = true;
        return;
      }
    }
  }

  Ready start(const Section& section, const Instr& instr, const Ready& after) {
    nodes_.push_back({at_, after.time + time_(section, instr), after.by});
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
  InstrAt at_;
  std::vector<Node> nodes_;
  Ready compute_;
  std::vector<Ready> whole_, shard_, reduced_;  // by parameter
  std::vector<bool> stale_;                     // by parameter: a gather has work to do
  std::vector<Ready> made_;                     // by value
};

}  // namespace

CriticalPath critical_path(const StepProgram& program, const InstrTime& time) {
  return PathFinder(program, time).find();
}

}  // namespace deepcompile
