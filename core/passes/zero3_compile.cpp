// SPDX-License-Identifier: Apache-2.0
#include "passes/zero3_compile.h"

#include <algorithm>
#include <utility>

#include "passes/placement.h"
#include "passes/section_edit.h"

namespace deepcompile {
namespace {

// Rebuilds one forward, backward or inference section.
class SectionBuilder {
 public:
  SectionBuilder(const StepProgram& program, Section& section)
      : program_(program),
        section_(section),
        last_use_(program.params.size(), 0),
        whole_(program.params.size(), false),
        reductions_(program, section.instrs) {
    for (size_t i = 0; i < section.instrs.size(); ++i) {
      for (ParamId param : sharded_inputs(section.instrs[i])) last_use_[index(param)] = i;
    }
  }

  // Adds to gathers[p] how often p is gathered.
  void build(std::vector<int>* gathers) {
    std::vector<Instr> out;
    out.reserve(section_.instrs.size() * 4);
    for (size_t i = 0; i < section_.instrs.size(); ++i) {
      const std::vector<ParamId> used = sharded_inputs(section_.instrs[i]);
      std::vector<ParamId> missing;
      for (ParamId param : used) {
        if (!whole_[index(param)]) missing.push_back(param);
      }
      for (ParamId param : missing) {
        out.push_back(on_param(Op::kGather, param));
        whole_[index(param)] = true;
        ++(*gathers)[index(param)];
      }
      for (ParamId param : missing) out.push_back(on_param(Op::kWait, param));
      out.push_back(section_.instrs[i]);
      for (ParamId param : used) {
        if (last_use_[index(param)] == i) out.push_back(on_param(Op::kRelease, param));
      }
      reductions_.after_run(section_.instrs[i], &out);
    }
    reductions_.at_end(&out);
    section_.instrs = std::move(out);
  }

 private:
  // Each once, in the order of the region's inputs.
  std::vector<ParamId> sharded_inputs(const Instr& run) const {
    std::vector<ParamId> out;
    for (const Operand& operand : program_.region(*run.region).inputs) {
      const auto* ref = std::get_if<ParamRef>(&operand);
      if (ref == nullptr || program_.param(ref->param).placement != Placement::kSharded) continue;
      if (std::find(out.begin(), out.end(), ref->param) == out.end()) out.push_back(ref->param);
    }
    return out;
  }

  const StepProgram& program_;
  Section& section_;
  std::vector<size_t> last_use_;  // by parameter
  std::vector<bool> whole_;       // by parameter
  ReductionPlacer reductions_;
};

void build_update(const StepProgram& program, Section& section) {
  section.instrs = place_updates(program);
  for (Op op : {Op::kGather, Op::kWait}) {
    for (size_t i = 0; i < program.params.size(); ++i) {
      const Param& param = program.params[i];
      if (!param.trainable || param.placement != Placement::kWhole) continue;
      section.instrs.push_back(on_param(op, ParamId{static_cast<uint32_t>(i)}));
    }
  }
}

std::string times(int count) {
  return count == 1 ? "once" : std::to_string(count) + " times";
}

void explain(const StepProgram& program, const std::vector<int>& gathers, bool updates,
             PassContext& context) {
  for (size_t i = 0; i < program.params.size(); ++i) {
    const ParamId id{static_cast<uint32_t>(i)};
    if (gathers[i] > 0) {
      context.because(id, "kept sharded: " + pretty(program.shard_bytes(id)) +
                              " a rank instead of " + pretty(program.full_bytes(id)) +
                              ", gathered " + times(gathers[i]) + " a micro batch");
    } else if (updates && program.param(id).placement == Placement::kWhole &&
               program.param(id).trainable) {
      context.because(id, "kept whole: " + pretty(program.full_bytes(id)) +
                              " a rank, gathered once a step, after its update");
    }
  }
}

}  // namespace

Contract Zero3Compile::contract() const {
  return {.needs = {},
          .provides = {Fact::kGathersPlaced, Fact::kReductionsPlaced, Fact::kUpdatesPlaced},
          .conflicts = {Fact::kGathersPlaced, Fact::kReductionsPlaced, Fact::kUpdatesPlaced}};
}

void Zero3Compile::run(StepProgram& program, PassContext& context) const {
  check_compute_only(program, name());
  std::vector<int> gathers(program.params.size(), 0);
  bool updates = false;
  for (Section& section : program.sections) {
    if (section.kind == SectionKind::kUpdate) {
      build_update(program, section);
      updates = true;
    } else {
      SectionBuilder(program, section).build(&gathers);
    }
  }
  explain(program, gathers, updates, context);
}

}  // namespace deepcompile
