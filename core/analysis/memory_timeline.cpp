// SPDX-License-Identifier: Apache-2.0
#include "analysis/memory_timeline.h"

#include <algorithm>
#include <unordered_set>
#include <utility>

#include "analysis/footprint.h"
#include "analysis/liveness.h"

namespace deepcompile {
namespace {

class Timeline {
 public:
  explicit Timeline(const StepProgram& program)
      : program_(program),
        liveness_(analyze_liveness(program)),
        held_(program.params.size(), false),
        summed_(program.params.size(), false),
        alive_(program.values.size(), false) {
    for (size_t i = 0; i < program.params.size(); ++i) {
      footprints_.push_back(footprint(program, ParamId{static_cast<uint32_t>(i)}));
      now_.weights += footprints_[i].weights;
      now_.masters += footprints_[i].master;
      now_.moments += footprints_[i].moments;
    }
    out_.base = now_.total();
  }

  MemoryTimeline measure() {
    walk();          // finds what a step leaves gathered
    steady_state();  // and this is the step that counts
    walk();
    return std::move(out_);
  }

 private:
  void steady_state() {
    out_.points.clear();
    // Micro batches before the last have left their sums; a step before has not.
    now_.gradients = {};
    for (size_t i = 0; i < summed_.size(); ++i) {
      summed_[i] = program_.accumulation > 1 && reduced_somewhere_.contains(i);
      if (summed_[i]) now_.gradients += footprints_[i].gradient;
    }
    out_.peak = now_.total();
    out_.peak_point = 0;
    out_.at_peak = now_;
  }

  void walk() {
    for (size_t s = 0; s < program_.sections.size(); ++s) {
      const Section& section = program_.sections[s];
      for (ValueId id : section.inputs) make(id);
      for (size_t i = 0; i < section.instrs.size(); ++i) {
        const MemoryParts during = begin(section.instrs[i]);
        finish(section.instrs[i]);
        for (ValueId id : liveness_.sections[s].frees[i]) free(id);
        record(s, i, during);
      }
      hand_over(s);
    }
  }

  // What the instruction adds, workspace included.
  MemoryParts begin(const Instr& instr) {
    Bytes workspace;
    if (instr.op == Op::kRun) {
      const Region& region = program_.region(*instr.region);
      for (ValueId id : region.outputs) make(id);
      workspace = region.workspace;
    } else if (instr.op == Op::kGather) {
      hold(*instr.param, true);
    } else if (instr.op == Op::kReduce) {
      now_.reductions += reduction(*instr.param);
    } else if (instr.op == Op::kAccumulate && program_.accumulation > 1) {
      sum(*instr.param, true);
    }
    MemoryParts during = now_;
    during.workspace = workspace;
    return during;
  }

  // What it gives back.
  void finish(const Instr& instr) {
    if (instr.op == Op::kRelease) hold(*instr.param, false);
    if (instr.op == Op::kUpdate) sum(*instr.param, false);
    if (instr.op != Op::kAccumulate) return;
    now_.reductions -= reduction(*instr.param);
    sum(*instr.param, true);  // one micro batch: the result stays, as the gradient
    reduced_somewhere_.insert(index(*instr.param));
  }

  void record(size_t section, size_t instr, const MemoryParts& during) {
    const Bytes total = during.total();
    if (total > out_.peak) {
      out_.peak = total;
      out_.peak_point = out_.points.size();
      out_.at_peak = during;
    }
    out_.points.push_back(
        {static_cast<uint32_t>(section), static_cast<uint32_t>(instr), total, now_.total()});
  }

  Bytes reduction(ParamId id) const {
    const ParamFootprint& of = footprints_[index(id)];
    return of.reduction_input + of.reduction_result;
  }
  void hold(ParamId id, bool on) {
    if (held_[index(id)] == on) return;
    held_[index(id)] = on;
    const Bytes bytes = footprints_[index(id)].gathered;
    on ? now_.gathered += bytes : now_.gathered -= bytes;
  }
  void sum(ParamId id, bool on) {
    if (summed_[index(id)] == on) return;
    summed_[index(id)] = on;
    const Bytes bytes = footprints_[index(id)].gradient;
    on ? now_.gradients += bytes : now_.gradients -= bytes;
  }
  void make(ValueId id) {
    if (alive_[index(id)]) return;
    alive_[index(id)] = true;
    now_.values += program_.value(id).bytes;
  }
  void free(ValueId id) {
    if (!alive_[index(id)]) return;
    alive_[index(id)] = false;
    now_.values -= program_.value(id).bytes;
  }

  // The section's outputs go to the caller. He keeps a forward's until its
  // backward is over, the others no longer than the section.
  void hand_over(size_t at) {
    const Section& section = program_.sections[at];
    const auto has = [](const std::vector<ValueId>& ids, ValueId id) {
      return std::find(ids.begin(), ids.end(), id) != ids.end();
    };
    // Inputs that no instruction could free, because there is none.
    for (ValueId id : section.inputs) {
      if (!has(section.outputs, id) && !has(liveness_.sections[at].saved, id)) free(id);
    }
    const bool waits = section.kind == SectionKind::kForward &&
                       program_.find_section(SectionKind::kBackward, section.graph);
    if (waits) return;
    for (ValueId id : section.outputs) free(id);
    if (section.kind != SectionKind::kBackward) return;
    const auto forward = program_.find_section(SectionKind::kForward, section.graph);
    for (ValueId id : program_.sections[index(*forward)].outputs) free(id);
  }

  const StepProgram& program_;
  Liveness liveness_;
  std::vector<ParamFootprint> footprints_;
  std::vector<bool> held_;    // by parameter: gathered
  std::vector<bool> summed_;  // by parameter: has a gradient
  std::vector<bool> alive_;   // by value
  std::unordered_set<size_t> reduced_somewhere_;
  MemoryParts now_;
  MemoryTimeline out_;
};

}  // namespace

MemoryTimeline memory_timeline(const StepProgram& program) {
  return Timeline(program).measure();
}

}  // namespace deepcompile
