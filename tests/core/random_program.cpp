// SPDX-License-Identifier: Apache-2.0
#include "random_program.h"

#include <utility>

namespace deepcompile {
namespace {

class Generator {
 public:
  Generator(uint32_t seed, const RandomProgramOptions& options)
      : random_(seed), once_(~seed), options_(options) {}

  StepProgram generate() {
    program_.name = "random";
    program_.world = pick(random_, 1, 8);
    program_.accumulation = chance(3) ? pick(random_, 2, 4) : 1;
    program_.clip = chance(2);
    program_.reduce_dtype = chance(2) ? DType::kBF16 : DType::kF32;
    const int64_t params = pick(random_, 1, 12);
    for (int64_t i = 0; i < params; ++i) add_param(i);
    const auto graphs = static_cast<uint32_t>(pick(random_, 1, 3));
    for (graph_ = 0; graph_ < graphs; ++graph_) add_graph();
    Section update;
    update.kind = SectionKind::kUpdate;
    program_.sections.push_back(std::move(update));
    return std::move(program_);
  }

 private:
  // True once in `n` on average.
  bool chance(int64_t n) { return pick(random_, 1, n) == 1; }

  template <typename T>
  const T& one_of(const std::vector<T>& items) {
    return items[static_cast<size_t>(pick(random_, 0, static_cast<int64_t>(items.size()) - 1))];
  }

  void add_param(int64_t i) {
    Param param;
    param.name = "p" + std::to_string(i);
    param.dtype = one_of(std::vector{DType::kF32, DType::kBF16, DType::kF16, DType::kF64});
    param.numel = pick(random_, 1, 5000);
    param.trainable = !chance(4);
    param.placement = chance(4) ? Placement::kWhole : Placement::kSharded;
    if (options_.replicated) param.placement = Placement::kReplicated;
    const int64_t members = chance(3) ? pick(random_, 2, 4) : 1;
    for (int64_t m = 0; m < members && members > 1; ++m) {
      param.members.push_back(chance(5) ? "odd \"" + std::to_string(m) + "\"\n"
                                        : param.name + "." + std::to_string(m));
    }
    program_.add_param(std::move(param));
  }

  ParamRef any_member() {
    const auto id = pick(random_, 0, static_cast<int64_t>(program_.params.size()) - 1);
    const ParamId param{static_cast<uint32_t>(id)};
    const auto members = static_cast<int64_t>(program_.param(param).members.size());
    return {param, static_cast<uint32_t>(pick(random_, 0, members - 1))};
  }

  ValueId new_value(std::optional<ParamRef> grad_of = std::nullopt) {
    Value value;
    value.name = (grad_of ? "g" : "v") + std::to_string(program_.values.size());
    value.bytes = {pick(random_, 0, 1 << 16)};
    value.grad_of = grad_of;
    return program_.add_value(std::move(value));
  }

  // A region that reads some of `values` and makes one to three more, which it
  // adds to `values`. Backward regions also make gradients.
  void add_region(Section* section, std::vector<ValueId>* values) {
    Region region;
    region.name = "r" + std::to_string(program_.regions.size());
    region.code = static_cast<uint32_t>(pick(random_, 0, 5));
    region.workspace = {chance(2) ? pick(random_, 0, 1 << 20) : 0};
    region.moved = {pick(random_, 0, 1 << 20)};
    region.flops = pick(random_, 0, 1 << 30);
    region.once = pick(once_, 1, 10) == 1;
    if (chance(2)) region.time = Nanos{pick(random_, 0, 1 << 20)};
    for (int64_t i = pick(random_, 0, 3); i > 0; --i) region.inputs.push_back(one_of(*values));
    for (int64_t i = pick(random_, 0, 4); i > 0; --i) region.inputs.push_back(any_member());
    for (int64_t i = pick(random_, 1, 3); i > 0; --i) region.outputs.push_back(new_value());
    values->insert(values->end(), region.outputs.begin(), region.outputs.end());
    if (section->kind == SectionKind::kBackward) {
      for (int64_t i = pick(random_, 0, 3); i > 0; --i) {
        const ParamRef of = any_member();
        if (!program_.param(of.param).trainable) continue;
        region.outputs.push_back(new_value(of));
        // Sometimes a later region reads a gradient, or it is an output.
        if (chance(5)) values->push_back(region.outputs.back());
      }
    }
    const RegionId id = program_.add_region(std::move(region));
    section->instrs.push_back({Op::kRun, std::nullopt, id, {}});
  }

  void add_section(SectionKind kind, std::vector<ValueId>* values) {
    Section section;
    section.kind = kind;
    section.graph = graph_;
    for (int64_t i = pick(random_, 1, 3); i > 0; --i) section.inputs.push_back(new_value());
    values->insert(values->end(), section.inputs.begin(), section.inputs.end());
    for (int64_t i = pick(random_, 0, 8); i > 0; --i) add_region(&section, values);
    for (int64_t i = pick(random_, 0, 2); i > 0; --i) section.outputs.push_back(one_of(*values));
    program_.sections.push_back(std::move(section));
  }

  void add_graph() {
    std::vector<ValueId> values;
    if (chance(4)) return add_section(SectionKind::kInference, &values);
    add_section(SectionKind::kForward, &values);
    if (!chance(6)) add_section(SectionKind::kBackward, &values);
  }

  std::mt19937 random_, once_;
  RandomProgramOptions options_;
  uint32_t graph_ = 0;
  StepProgram program_;
};

}  // namespace

int64_t pick(std::mt19937& random, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
}

StepProgram random_program(uint32_t seed, const RandomProgramOptions& options) {
  return Generator(seed, options).generate();
}

}  // namespace deepcompile
