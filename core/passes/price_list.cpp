// SPDX-License-Identifier: Apache-2.0
#include "passes/price_list.h"

#include <algorithm>

#include "base/error.h"
#include "base/json_reader.h"

namespace deepcompile {
namespace {

std::vector<int64_t> integers(const JsonReader& node) {
  std::vector<int64_t> result;
  for (const JsonReader& each : node.elements())
    result.push_back(each.integer(0, kLongestStep.value));
  return result;
}

int64_t price(const std::vector<int64_t>& list, size_t position) {
  if (position >= list.size()) {
    throw UserError("[passes] price list: the program has tables it was not made for.");
  }
  return list[position];
}

}  // namespace

PriceList::PriceList(const StepProgram& program, const Estimator& estimator) {
  slowdown_ = estimator.compute_slowdown(program);
  beside_ = estimator.host_beside(program);
  for (int i = 0; i < kOpCount; ++i) {
    Instr instr;
    instr.op = static_cast<Op>(i);
    const OpTraits& kind = traits(instr.op);
    const auto ask = [&] { return estimator.duration(program, instr).value; };
    if (kind.takes_region) {
      for (uint32_t r = 0; r < program.regions.size(); ++r) {
        instr.region = RegionId{r};
        regions_[i].push_back(ask());
      }
    } else if (kind.takes_param) {
      for (uint32_t p = 0; p < program.params.size(); ++p) {
        instr.param = ParamId{p};
        params_[i].push_back(ask());
      }
    } else if (kind.takes_values) {
      for (uint32_t v = 0; v < program.values.size(); ++v) {
        instr.values = {ValueId{v}};
        values_[i].push_back(ask());
      }
    } else {
      alone_[i] = ask();
    }
  }
  for (uint32_t p = 0; p < program.params.size(); ++p) {
    local_sums_.push_back(estimator.local_sum(program, ParamId{p}).value);
    stagings_.push_back(estimator.staging(program, ParamId{p}).value);
  }
  for (int i = 0; i < kSectionKindCount; ++i) {
    sections_.push_back(estimator.section_overhead(program, static_cast<SectionKind>(i)).value);
  }
}

PriceList::PriceList(std::string_view json, const std::string& where) {
  const nlohmann::json document = parse_json(json, where);
  const JsonReader root(document, where);
  slowdown_ = root.at("slowdown").positive();
  beside_ = {root.at("to_device_beside").positive(), root.at("to_host_beside").positive()};
  local_sums_ = integers(root.at("local_sums"));
  stagings_ = integers(root.at("stagings"));
  sections_ = integers(root.at("sections"));
  const JsonReader ops = root.at("ops");
  for (int i = 0; i < kOpCount; ++i) {
    const OpTraits& kind = traits(static_cast<Op>(i));
    const std::vector<int64_t> list = integers(ops.at(std::string(kind.name)));
    if (kind.takes_region) {
      regions_[i] = list;
    } else if (kind.takes_param) {
      params_[i] = list;
    } else if (kind.takes_values) {
      values_[i] = list;
    } else {
      alone_[i] = price(list, 0);
    }
  }
}

std::string PriceList::json() const {
  nlohmann::json ops;
  for (int i = 0; i < kOpCount; ++i) {
    const OpTraits& kind = traits(static_cast<Op>(i));
    ops[std::string(kind.name)] = kind.takes_region   ? regions_[i]
                                  : kind.takes_param  ? params_[i]
                                  : kind.takes_values ? values_[i]
                                                      : std::vector<int64_t>{alone_[i]};
  }
  return nlohmann::json{{"slowdown", slowdown_},
                        {"to_device_beside", beside_.to_device},
                        {"to_host_beside", beside_.to_host},
                        {"local_sums", local_sums_},
                        {"stagings", stagings_},
                        {"sections", sections_},
                        {"ops", ops}}
      .dump();
}

Nanos PriceList::duration(const StepProgram&, const Instr& instr) const {
  const auto op = static_cast<size_t>(instr.op);
  if (instr.region) return Nanos{price(regions_[op], index(*instr.region))};
  if (instr.param) return Nanos{price(params_[op], index(*instr.param))};
  if (!traits(instr.op).takes_values) return Nanos{alone_[op]};
  int64_t sum = 0;
  for (ValueId id : instr.values) {
    sum = std::min(kLongestStep.value, sum + price(values_[op], index(id)));
  }
  return Nanos{sum};
}

Nanos PriceList::local_sum(const StepProgram&, ParamId id) const {
  return Nanos{price(local_sums_, index(id))};
}

Nanos PriceList::staging(const StepProgram&, ParamId id) const {
  return Nanos{price(stagings_, index(id))};
}

Nanos PriceList::section_overhead(const StepProgram&, SectionKind kind) const {
  return Nanos{price(sections_, static_cast<size_t>(kind))};
}

double PriceList::compute_slowdown(const StepProgram&) const {
  return slowdown_;
}

HostBeside PriceList::host_beside(const StepProgram&) const {
  return beside_;
}

}  // namespace deepcompile
