// SPDX-License-Identifier: Apache-2.0
#include "passes/optimizer_placement.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <variant>

#include "base/error.h"
#include "ir/text.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

// How many runs before its update a parameter's states start to come back,
// and after it they are waited for on their way out.
constexpr size_t kStateLead = 2;
constexpr size_t kStateTrail = 1;

bool moves_states(Op op) {
  return op == Op::kOffloadStates || op == Op::kEvictStates || op == Op::kReloadStates ||
         op == Op::kAwaitStates;
}

struct At {
  size_t section = 0, instr = 0;
};

// What placement needs to know of one parameter.
struct ParamFacts {
  std::optional<size_t> update;     // in the update section
  bool gathered_in_update = false;  // sharded, and gathered where it is updated
  std::vector<At> state_moves;
  bool states_wait = false;         // copied in where they are used: the synchronous form
  std::optional<At> first_forward;  // its first use by a forward
  std::optional<At> accumulated;    // last accumulate in the step
  std::optional<At> first_accumulated;
  std::vector<At> first_uses;            // of each section but the update, in order
  std::vector<At> first_gathers;         // of each section
  std::vector<size_t> update_transfers;  // gathers and waits in the update section
  std::optional<At> last_use;            // of the step
};

class Placer {
 public:
  explicit Placer(const StepProgram& program)
      : program_(program), facts_(program.params.size()), runs_(program.sections.size()) {
    for (size_t s = 0; s < program.sections.size(); ++s) {
      const Section& section = program.sections[s];
      if (section.kind == SectionKind::kUpdate) update_ = s;
      for (size_t i = 0; i < section.instrs.size(); ++i) look_at(s, i);
      edits_.emplace_back(section.instrs);
    }
    DC_CHECK(update_.has_value(), "placing the optimizer needs an update section");
  }

  OptimizerPlacement next_forward(int ahead) {
    for (ParamId id : in_order([](const ParamFacts& of) { return of.first_forward; })) {
      const std::string kept = kept_from_forward(facts(id));
      if (kept.empty()) {
        defer(id, static_cast<size_t>(std::max(ahead, 0)));
      } else {
        out_.updates.push_back({id, static_cast<uint32_t>(*update_), 0, kept});
      }
    }
    return finish();
  }

  OptimizerPlacement backward() {
    for (ParamId id : in_order([](const ParamFacts& of) { return of.accumulated; })) {
      const std::string kept = kept_from_backward(facts(id));
      if (kept.empty()) {
        update_early(id);
      } else {
        out_.updates.push_back({id, static_cast<uint32_t>(*update_), 0, kept});
      }
    }
    return finish();
  }

 private:
  ParamFacts& facts(ParamId id) { return facts_[index(id)]; }
  const std::vector<Instr>& instrs(size_t section) const {
    return program_.sections[section].instrs;
  }

  void look_at(size_t s, size_t i) {
    const Instr& instr = instrs(s)[i];
    const bool in_update = program_.sections[s].kind == SectionKind::kUpdate;
    if (instr.op == Op::kRun) return look_at_run(s, i);
    if (!instr.param) return;
    ParamFacts& of = facts(*instr.param);
    if (instr.op == Op::kUpdate && in_update) of.update = i;
    if (instr.op == Op::kAccumulate) of.accumulated = {s, i};
    if (instr.op == Op::kAccumulate && !of.first_accumulated) of.first_accumulated = {s, i};
    if (moves_states(instr.op)) of.state_moves.push_back({s, i});
    if (instr.op == Op::kAwaitStates && i > 0) {
      const Instr& before = instrs(s)[i - 1];
      if (before.op == Op::kReloadStates && before.param == instr.param) of.states_wait = true;
    }
    const bool sharded = program_.param(*instr.param).placement == Placement::kSharded;
    const bool gather = instr.op == Op::kGather;
    if (gather && in_update && sharded) of.gathered_in_update = true;
    if (in_update && (gather || instr.op == Op::kWait)) of.update_transfers.push_back(i);
    const bool first = of.first_gathers.empty() || of.first_gathers.back().section != s;
    if (gather && first) of.first_gathers.push_back({s, i});
  }

  void look_at_run(size_t s, size_t i) {
    const bool forward = program_.sections[s].kind == SectionKind::kForward;
    for (const Operand& operand : program_.region(*instrs(s)[i].region).inputs) {
      const auto* ref = std::get_if<ParamRef>(&operand);
      if (ref == nullptr) continue;
      ParamFacts& of = facts(ref->param);
      of.last_use = {s, i};
      if (forward && !of.first_forward) of.first_forward = {s, i};
      if (of.first_uses.empty() || of.first_uses.back().section != s)
        of.first_uses.push_back({s, i});
    }
    runs_[s].push_back(i);
  }

  // Parameters that the update section updates, by the place that `of` gives;
  // those without come last.
  template <typename Of>
  std::vector<ParamId> in_order(Of of) {
    std::vector<ParamId> ids;
    for (size_t p = 0; p < facts_.size(); ++p) {
      if (facts_[p].update) ids.push_back(ParamId{static_cast<uint32_t>(p)});
    }
    const auto key = [&](ParamId id) {
      const std::optional<At> at = of(facts(id));
      return at ? std::pair(at->section, at->instr) : std::pair(SIZE_MAX, SIZE_MAX);
    };
    std::stable_sort(ids.begin(), ids.end(), [&](ParamId a, ParamId b) { return key(a) < key(b); });
    return ids;
  }

  std::string kept_from_forward(const ParamFacts& of) const {
    if (!of.first_forward) return "no forward uses it";
    if (of.gathered_in_update) return "the update section gathers it";
    if (of.first_accumulated && of.first_accumulated->section < of.first_forward->section) {
      return "the step has its gradient before a forward uses it";
    }
    if (!of.state_moves.empty() && program_.accumulation > 1) {
      return "its states would move in each micro batch";
    }
    return "";
  }

  std::string kept_from_backward(const ParamFacts& of) const {
    if (!of.accumulated) return "no backward accumulates its gradient";
    const auto after = [](const At& a, const At& b) {
      return std::pair(a.section, a.instr) > std::pair(b.section, b.instr);
    };
    if (of.last_use && after(*of.last_use, *of.accumulated)) return "it is used later in the step";
    if (!of.state_moves.empty() && program_.accumulation > 1) {
      return "its states would move in each micro batch";
    }
    return "";
  }

  void defer(ParamId id, size_t ahead) {
    const ParamFacts& of = facts(id);
    const bool sharded = program_.param(id).placement == Placement::kSharded;
    const At use = *of.first_forward;
    edits_[*update_].drop(*of.update);
    edits_[*update_].insert(*of.update, on_param(Op::kDefer, id));
    const size_t run = run_number(use);
    const size_t to = run > ahead ? run - ahead : 0;
    size_t slot = slot_before(use.section, to);
    for (const At& gather : of.first_gathers) {  // never after one of the same section
      if (gather.section == use.section) slot = std::min(slot, gather.instr);
    }
    insert_update(id, use.section, slot);
    if (!sharded) {
      edits_[use.section].insert(slot, on_param(Op::kGather, id));
      for (size_t at : of.update_transfers) edits_[*update_].drop(at);
      for (const At& each : of.first_uses) regather(id, each, each.section != use.section);
    }
    out_.updates.push_back(
        {id, static_cast<uint32_t>(use.section), static_cast<int>(run - to), {}});
  }

  // A whole parameter that is deferred is gathered by each section that uses it.
  void regather(ParamId id, const At& use, bool gather) {
    if (gather) edits_[use.section].insert(use.instr, on_param(Op::kGather, id));
    edits_[use.section].insert(use.instr, on_param(Op::kWait, id));
  }

  void update_early(ParamId id) {
    const At at = *facts(id).accumulated;
    insert_update(id, at.section, at.instr + 1);
    out_.updates.push_back({id, static_cast<uint32_t>(at.section), 0, {}});
  }

  // With its states' way in and out, if they live on the host.
  void insert_update(ParamId id, size_t section, size_t slot) {
    SectionEdit& edit = edits_[section];
    const ParamFacts& of = facts(id);
    if (of.state_moves.empty()) return edit.insert(slot, on_param(Op::kUpdate, id));
    for (const At& at : of.state_moves) edits_[at.section].drop(at.instr);
    const auto& runs = runs_[section];
    const auto next = static_cast<size_t>(std::lower_bound(runs.begin(), runs.end(), slot) -
                                          runs.begin());  // the first run after the slot
    const size_t from = next > kStateLead ? runs[next - kStateLead] : 0;
    edit.insert(of.states_wait ? slot : std::min(from, slot), on_param(Op::kReloadStates, id));
    edit.insert(slot, on_param(Op::kAwaitStates, id));
    edit.insert(slot, on_param(Op::kUpdate, id));
    edit.insert(slot, on_param(Op::kOffloadStates, id));
    const size_t last = next + kStateTrail - 1;
    const size_t out = last < runs.size() ? runs[last] + 1 : instrs(section).size();
    edit.insert(of.states_wait ? slot : out, on_param(Op::kEvictStates, id));
  }

  // Which run of its section a use is.
  size_t run_number(const At& use) const {
    const auto& runs = runs_[use.section];
    return static_cast<size_t>(std::lower_bound(runs.begin(), runs.end(), use.instr) -
                               runs.begin());
  }

  // Between the gathers and the waits that stand before the run: compute has
  // something to do while they go on.
  size_t slot_before(size_t section, size_t run) const {
    const size_t at = runs_[section][run];
    size_t slot = run == 0 ? 0 : runs_[section][run - 1] + 1;
    while (slot < at && instrs(section)[slot].op != Op::kWait) ++slot;
    return slot;
  }

  OptimizerPlacement finish() {
    for (SectionEdit& edit : edits_) out_.instrs.push_back(std::move(edit).apply());
    std::sort(out_.updates.begin(), out_.updates.end(),
              [](const PlacedUpdate& a, const PlacedUpdate& b) { return a.param < b.param; });
    return std::move(out_);
  }

  const StepProgram& program_;
  std::vector<ParamFacts> facts_;          // by parameter
  std::vector<std::vector<size_t>> runs_;  // by section: positions
  std::optional<size_t> update_;           // section
  std::vector<SectionEdit> edits_;         // by section
  OptimizerPlacement out_;
};

}  // namespace

OptimizerPlacement place_in_next_forward(const StepProgram& program, int ahead) {
  return Placer(program).next_forward(ahead);
}

OptimizerPlacement place_in_backward(const StepProgram& program) {
  return Placer(program).backward();
}

}  // namespace deepcompile
