// SPDX-License-Identifier: Apache-2.0
#include "ir/merge_steps.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "ir/text.h"

namespace deepcompile {
namespace {

class Merger {
 public:
  Merger(std::string name, const std::vector<StepProgram>& graphs, const StepProgram& update)
      : graphs_(graphs), update_(update) {
    const StepProgram& first = graphs.empty() ? update : graphs.front();
    out_.name = std::move(name);
    out_.world = first.world;
    out_.accumulation = first.accumulation;
    out_.clip = first.clip;
    out_.boundary = first.boundary;
    out_.reduce_dtype = first.reduce_dtype;
  }

  StepProgram merge() {
    if (update_.sections.size() != 1 || update_.sections[0].kind != SectionKind::kUpdate) {
      fail("program " + update_.name +
           " is not an update program. Give it one section, of kind update.");
    }
    std::vector<Section> backwards;
    for (size_t k = 0; k < graphs_.size(); ++k) {
      add_tables(graphs_[k], graphs_.size() > 1 ? "g" + std::to_string(k) + "." : "");
      for (const Section& section : graphs_[k].sections) {
        if (section.kind == SectionKind::kUpdate) {
          fail("graph program " + graphs_[k].name +
               " has an update section. Pass it as the update program.");
        }
        Section merged = renumbered(section, static_cast<uint32_t>(k));
        check_new(k, merged);
        (section.kind == SectionKind::kBackward ? backwards : out_.sections)
            .push_back(std::move(merged));
      }
    }
    out_.sections.insert(out_.sections.end(), std::make_move_iterator(backwards.rbegin()),
                         std::make_move_iterator(backwards.rend()));
    add_tables(update_, "");
    out_.sections.push_back(renumbered(update_.sections[0], 0));
    return std::move(out_);
  }

 private:
  [[noreturn]] void fail(const std::string& message) const {
    throw UserError("[ir] merge into " + out_.name + ": " + message);
  }

  // One graph has at most one section of each kind.
  void check_new(size_t graph, const Section& section) {
    const auto kind = std::pair(section.kind, graph);
    if (std::find(seen_.begin(), seen_.end(), kind) != seen_.end()) {
      fail("graph program " + graphs_[graph].name + " has two " +
           std::string(to_string(section.kind)) + " sections. Pass one graph a program.");
    }
    seen_.push_back(kind);
  }

  void add_tables(const StepProgram& from, const std::string& prefix) {
    check_header(from);
    params_.clear();
    values_.clear();
    regions_.clear();
    for (const Param& param : from.params) params_.push_back(unite(from, param));
    for (Value value : from.values) {
      value.name = prefix + value.name;
      if (value.grad_of) value.grad_of->param = params_[index(value.grad_of->param)];
      if (value.rows_of) value.rows_of->param = params_[index(value.rows_of->param)];
      values_.push_back(out_.add_value(std::move(value)));
    }
    for (Region region : from.regions) {
      region.name = prefix + region.name;
      for (Operand& operand : region.inputs) {
        if (auto* ref = std::get_if<ParamRef>(&operand)) {
          ref->param = params_[index(ref->param)];
        } else {
          operand = values_[index(std::get<ValueId>(operand))];
        }
      }
      for (ValueId& id : region.outputs) id = values_[index(id)];
      regions_.push_back(out_.add_region(std::move(region)));
    }
    for (Reason reason : from.reasons) {
      if (from.find_region(reason.object) || from.find_value(reason.object)) {
        reason.object = prefix + reason.object;
      }
      out_.reasons.push_back(std::move(reason));
    }
  }

  void check_header(const StepProgram& from) const {
    const auto check = [&](bool same, const char* what) {
      if (same) return;
      fail("program " + from.name + " has another " + what +
           " than the first. Build all of them for the same run.");
    };
    check(from.world == out_.world, "world size");
    check(from.accumulation == out_.accumulation, "number of accumulation steps");
    check(from.clip == out_.clip, "setting of clip");
    check(from.boundary == out_.boundary, "setting of boundary");
    check(from.reduce_dtype == out_.reduce_dtype, "reduce type");
  }

  ParamId unite(const StepProgram& from, const Param& param) {
    const auto known = out_.find_param(param.name);
    if (!known) return out_.add_param(param);
    const Param& other = out_.param(*known);
    const auto check = [&](bool same, const char* what) {
      if (same) return;
      fail("parameter " + param.name + " has another " + what + " in program " + from.name +
           " than before. Build all programs from one model.");
    };
    check(param.dtype == other.dtype, "element type");
    check(param.numel == other.numel, "number of elements");
    check(param.placement == other.placement, "placement");
    check(param.trainable == other.trainable, "setting of frozen");
    check(param.members == other.members, "list of members");
    return *known;
  }

  // `section` in the ids of the tables added last.
  Section renumbered(Section section, uint32_t graph) const {
    section.graph = graph;
    for (ValueId& id : section.inputs) id = values_[index(id)];
    for (ValueId& id : section.outputs) id = values_[index(id)];
    for (Instr& instr : section.instrs) {
      if (instr.param) instr.param = params_[index(*instr.param)];
      if (instr.region) instr.region = regions_[index(*instr.region)];
      for (ValueId& id : instr.values) id = values_[index(id)];
    }
    return section;
  }

  const std::vector<StepProgram>& graphs_;
  const StepProgram& update_;
  StepProgram out_;
  std::vector<std::pair<SectionKind, size_t>> seen_;
  std::vector<ParamId> params_;  // ids in out_ of the program added last
  std::vector<ValueId> values_;
  std::vector<RegionId> regions_;
};

}  // namespace

StepProgram merge_steps(std::string name, const std::vector<StepProgram>& graphs,
                        const StepProgram& update) {
  return Merger(std::move(name), graphs, update).merge();
}

}  // namespace deepcompile
