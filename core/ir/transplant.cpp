// SPDX-License-Identifier: Apache-2.0
#include "ir/transplant.h"

#include <unordered_map>

#include "base/error.h"
#include "base/hash.h"
#include "ir/text.h"

namespace deepcompile {
namespace {

// What two graphs are compared by, and matched by if they are alike.
struct Shape {
  std::vector<std::string> sections;
  std::vector<RegionId> runs;      // first runs, in order
  std::vector<ValueId> gradients;  // made by them, in order
  std::vector<ValueId> values;     // in the order in which they appear
  std::string links;               // which of `values` each place names
};

class ShapeReader {
 public:
  explicit ShapeReader(const StepProgram& program)
      : program_(program), ran_(program.regions.size()), place_(program.values.size(), -1) {}

  Shape read() {
    for (const Section& section : program_.sections) {
      std::string text(to_string(section.kind));
      for (ValueId id : section.inputs) {
        name(id);
        const auto& rows = program_.value(id).rows_of;
        if (rows) text += "\nrows of " + member({rows->param, 0});
      }
      for (const Instr& instr : section.instrs) {
        if (instr.op != Op::kRun || ran_[index(*instr.region)]) continue;
        ran_[index(*instr.region)] = true;
        text += run(*instr.region);
      }
      for (ValueId id : section.outputs) name(id);
      if (section.kind == SectionKind::kUpdate) text += trainable();
      shape_.sections.push_back(std::move(text));
      shape_.links += "|";
    }
    return std::move(shape_);
  }

 private:
  std::string run(RegionId id) {
    const Region& region = program_.region(id);
    shape_.runs.push_back(id);
    std::string text = "\nrun";
    for (const Operand& operand : region.inputs) {
      if (const auto* value = std::get_if<ValueId>(&operand)) {
        name(*value);
      } else {
        text += " " + member(std::get<ParamRef>(operand));
      }
    }
    shape_.links += region.once ? "!" : ">";
    for (ValueId out : region.outputs) {
      name(out);
      const auto& of = program_.value(out).grad_of;
      if (!of) continue;
      shape_.gradients.push_back(out);
      text += " ->" + member(*of);
    }
    return text;
  }

  // A parameter by what ranks must agree on.
  std::string member(ParamRef ref) const {
    const Param& param = program_.param(ref.param);
    return param.name + "[" + std::to_string(ref.member) +
           "]:" + std::string(to_string(param.placement)) + ":" + std::to_string(param.numel) +
           std::string(to_string(param.dtype)) + (param.trainable ? "" : ":frozen");
  }

  std::string trainable() const {
    std::string text;
    for (size_t i = 0; i < program_.params.size(); ++i) {
      if (!program_.params[i].trainable) continue;
      text += "\n" + member({ParamId{static_cast<uint32_t>(i)}, 0});
    }
    return text;
  }

  void name(ValueId id) {
    int64_t& at = place_[index(id)];
    if (at < 0) {
      at = static_cast<int64_t>(shape_.values.size());
      shape_.values.push_back(id);
    }
    shape_.links += std::to_string(at) + ",";
  }

  const StepProgram& program_;
  std::vector<bool> ran_;       // by region
  std::vector<int64_t> place_;  // by value, in shape_.values
  Shape shape_;
};

std::string digits(const std::vector<std::string>& texts) {
  Hash hash;
  for (const std::string& text : texts) hash.add(text + '\0');
  return hash.digits();
}

class Transplant {
 public:
  Transplant(const StepProgram& agreed, const StepProgram& plain)
      : agreed_(agreed), from_(ShapeReader(agreed).read()), out_(plain) {
    const Shape to = ShapeReader(plain).read();
    if (from_.sections != to.sections) {
      throw UserError("[ir] transplant: " + plain.name + " is not built as " + agreed.name +
                      ", whose plan it was to take: " + difference(to) + ". Plan it by itself.");
    }
    whole_ = from_.links == to.links;
    for (size_t i = 0; i < from_.runs.size(); ++i) regions_[index(from_.runs[i])] = to.runs[i];
    for (size_t i = 0; i < from_.gradients.size(); ++i) {
      values_[index(from_.gradients[i])] = to.gradients[i];
    }
    for (size_t i = 0; whole_ && i < from_.values.size(); ++i) {
      values_[index(from_.values[i])] = to.values[i];
    }
  }

  StepProgram carry_out() {
    std::vector<bool> ran(agreed_.regions.size());
    for (size_t s = 0; s < out_.sections.size(); ++s) {
      std::vector<Instr> instrs;
      for (const Instr& instr : agreed_.sections[s].instrs) {
        bool keep = whole_;
        if (instr.op == Op::kRun) {
          keep = keep || !ran[index(*instr.region)];
          ran[index(*instr.region)] = true;
        } else {
          keep = keep || instr.op == Op::kReduce || instr.values.empty();
        }
        if (keep) instrs.push_back(translated(instr));
      }
      out_.sections[s].instrs = std::move(instrs);
    }
    return std::move(out_);
  }

 private:
  std::string difference(const Shape& to) const {
    if (from_.sections.size() != to.sections.size()) {
      return "it has " + std::to_string(to.sections.size()) + " sections, not " +
             std::to_string(from_.sections.size());
    }
    for (size_t i = 0; i < to.sections.size(); ++i) {
      if (from_.sections[i] == to.sections[i]) continue;
      return "the runs of " + section_name(out_.sections[i]) +
             " read other parameters or make other gradients";
    }
    return "nothing";
  }

  Instr translated(Instr instr) {
    if (instr.param) {
      const Param& wanted = agreed_.param(*instr.param);
      const auto known = out_.find_param(wanted.name);
      instr.param = known ? *known : out_.add_param(wanted);
    }
    if (instr.region) instr.region = regions_.at(index(*instr.region));
    for (ValueId& id : instr.values) id = values_.at(index(id));
    return instr;
  }

  const StepProgram& agreed_;
  Shape from_;
  StepProgram out_;
  bool whole_ = false;
  std::unordered_map<size_t, RegionId> regions_;  // from agreed's to plain's
  std::unordered_map<size_t, ValueId> values_;
};

}  // namespace

std::string skeleton(const StepProgram& program) {
  return digits(ShapeReader(program).read().sections);
}

std::string structure(const StepProgram& program) {
  Shape shape = ShapeReader(program).read();
  shape.sections.push_back(std::move(shape.links));
  return digits(shape.sections);
}

StepProgram transplant(const StepProgram& agreed, const StepProgram& plain) {
  return Transplant(agreed, plain).carry_out();
}

}  // namespace deepcompile
