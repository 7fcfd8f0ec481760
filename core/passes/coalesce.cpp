// SPDX-License-Identifier: Apache-2.0
#include "passes/coalesce.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "analysis/memory_timeline.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

constexpr size_t kMostTransfers = 8;
constexpr Bytes kMostBytes{256 << 20};  // of whole parameters and gradients

using Instrs = std::vector<Instr>;

bool is_transfer(Op op) {
  return op == Op::kGather || op == Op::kReduce;
}

// What transfers may be moved behind.
bool goes_first(Op op) {
  return op == Op::kRelease || op == Op::kAccumulate || op == Op::kUpdate || op == Op::kDefer;
}

class SectionCoalescer {
 public:
  SectionCoalescer(const StepProgram& program, const Instrs& instrs)
      : program_(program),
        instrs_(instrs),
        sent_(program.params.size(), false),
        last_gather_(sent_.size(), 0) {
    out_.reserve(instrs.size());
  }

  Instrs run() && {
    for (const Instr& instr : instrs_) add(instr);
    end_waits();
    end_stretch();
    return std::move(out_);
  }

 private:
  void add(const Instr& instr) {
    if (instr.op != Op::kWait) end_waits();
    if (is_transfer(instr.op)) return add_transfer(instr);
    if (goes_first(instr.op)) {
      if (sent_[index(*instr.param)]) end_stretch();  // it belongs behind that transfer
      next_.push_back(instr);
      return;
    }
    end_stretch();
    (instr.op == Op::kWait ? waits_ : out_).push_back(instr);
  }

  void add_transfer(const Instr& instr) {
    const ParamId id = *instr.param;
    const bool gather = instr.op == Op::kGather;
    const Bytes bytes = gather ? program_.gather_bytes(id) : program_.reduce_bytes(id);
    const bool full = transfers_.size() == most_ || bytes_ + bytes > kMostBytes;
    if (full && !transfers_.empty()) {
      most_ = std::min(2 * most_, kMostTransfers);
      end_group();
    }
    move_to(&first_, &next_);
    transfers_.push_back(instr);
    bytes_ += bytes;
    sent_[index(id)] = true;
    if (gather) last_gather_[index(id)] = ++gathers_;
  }

  static void move_to(Instrs* to, Instrs* from) {
    to->insert(to->end(), from->begin(), from->end());
    from->clear();
  }

  void end_group() {
    for (const Instr& instr : transfers_) sent_[index(*instr.param)] = false;
    move_to(&out_, &first_);
    move_to(&out_, &transfers_);
    bytes_ = {};
  }

  void end_stretch() {
    move_to(&first_, &next_);
    end_group();
  }

  void end_waits() {
    const auto gathered = [&](const Instr& wait) { return last_gather_[index(*wait.param)]; };
    std::stable_sort(waits_.begin(), waits_.end(),
                     [&](const Instr& a, const Instr& b) { return gathered(a) > gathered(b); });
    move_to(&out_, &waits_);
  }

  const StepProgram& program_;
  const Instrs& instrs_;
  Instrs out_;
  Instrs first_, transfers_;         // of the group
  Instrs next_;                      // of this one or the next: behind its last transfer
  Instrs waits_;                     // that stand together
  size_t most_ = 1;                  // transfers that go together, by now
  Bytes bytes_;                      // of `transfers_`
  std::vector<bool> sent_;           // parameters with one of `transfers_`
  std::vector<size_t> last_gather_;  // of each parameter in this section; 0: none
  size_t gathers_ = 0;
};

}  // namespace

void coalesce(StepProgram* program) {
  const SectionInstrs before = instrs_of(*program);
  const Bytes peak = memory_peak(*program);
  SectionInstrs after;
  for (const Instrs& instrs : before) after.push_back(SectionCoalescer(*program, instrs).run());
  replace_instrs(after, program);
  if (memory_peak(*program) <= peak) return;
  replace_instrs(before, program);
  for (size_t s = 0; s < after.size(); ++s) {
    program->sections[s].instrs = after[s];
    if (memory_peak(*program) > peak) program->sections[s].instrs = before[s];
  }
}

void Coalesce::run(StepProgram& program, PassContext& context) const {
  size_t moved = 0;
  const SectionInstrs before = instrs_of(program);
  coalesce(&program);
  for (size_t s = 0; s < before.size(); ++s) {
    for (size_t i = 0; i < before[s].size(); ++i) {
      if (!(before[s][i] == program.sections[s].instrs[i])) ++moved;
    }
  }
  context.because(moved == 0 ? "unchanged: nothing can stand closer together"
                             : std::to_string(moved) + " instructions stand elsewhere");
}

}  // namespace deepcompile
