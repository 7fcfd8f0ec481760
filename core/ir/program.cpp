// SPDX-License-Identifier: Apache-2.0
#include "ir/program.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "ir/lexer.h"

namespace deepcompile {
namespace {

std::string quoted(std::string_view what, const std::string& name) {
  return "[ir] " + std::string(what) + " '" + name + "': ";
}

void check_name(std::string_view what, const std::string& name) {
  if (is_name(name)) return;
  throw UserError(quoted(what, name) +
                  "is not a name. Use letters, digits and _ . : / -, and begin with a letter, a "
                  "digit or _.");
}

constexpr int64_t kMostFlops = int64_t{1} << 60;

void check_not_too_many(std::string_view what, const std::string& name, std::string_view field,
                        int64_t number, int64_t most = kMostOfOne) {
  if (number <= most) return;
  throw UserError(quoted(what, name) + std::string(field) + " is " + std::to_string(number) +
                  ", and " + std::to_string(most) + " is the most there can be.");
}

void check_not_negative(std::string_view what, const std::string& name, std::string_view field,
                        int64_t number) {
  if (number >= 0) return;
  throw UserError(quoted(what, name) + std::string(field) + " is " + std::to_string(number) +
                  ". Give a number that is not negative.");
}

}  // namespace

bool is_name(std::string_view text) {
  return !text.empty() && is_word_start(text.front()) && word_length(text) == text.size();
}

std::string_view to_string(Placement placement) {
  switch (placement) {
    case Placement::kSharded:
      return "sharded";
    case Placement::kWhole:
      return "whole";
    case Placement::kReplicated:
      return "replicated";
  }
  DC_CHECK(false, "unknown placement");
}

std::optional<Placement> parse_placement(std::string_view word) {
  for (Placement each : {Placement::kSharded, Placement::kWhole, Placement::kReplicated}) {
    if (to_string(each) == word) return each;
  }
  return std::nullopt;
}

std::string_view to_string(SectionKind kind) {
  switch (kind) {
    case SectionKind::kForward:
      return "forward";
    case SectionKind::kBackward:
      return "backward";
    case SectionKind::kInference:
      return "inference";
    case SectionKind::kUpdate:
      return "update";
  }
  DC_CHECK(false, "unknown section kind");
}

std::optional<SectionKind> parse_section_kind(std::string_view word) {
  for (SectionKind each : {SectionKind::kForward, SectionKind::kBackward, SectionKind::kInference,
                           SectionKind::kUpdate}) {
    if (to_string(each) == word) return each;
  }
  return std::nullopt;
}

int64_t shard_numel(int64_t numel, int64_t world) {
  DC_CHECK(numel >= 0 && world >= 1, "a shard needs elements and ranks");
  const int64_t piece = (numel + world - 1) / world;
  return (piece + kShardAlignment - 1) / kShardAlignment * kShardAlignment;
}

void StepProgram::check_operand_name(std::string_view what, const std::string& name) const {
  check_name(what, name);
  const auto it = operands_.find(name);
  if (it == operands_.end()) return;
  const char* holder = std::holds_alternative<ParamId>(it->second) ? "parameter" : "value";
  throw UserError(quoted(what, name) + "a " + holder +
                  " has this name already. Names are unique over parameters and values: rename "
                  "one of them.");
}

void StepProgram::check_param_ref(std::string_view what, const std::string& name,
                                  ParamRef ref) const {
  if (index(ref.param) >= params.size()) {
    throw UserError(quoted(what, name) + "names parameter " + std::to_string(index(ref.param)) +
                    " of " + std::to_string(params.size()) + ". Add the parameter first.");
  }
  const Param& owner = param(ref.param);
  if (ref.member >= owner.members.size()) {
    throw UserError(quoted(what, name) + "names member " + std::to_string(ref.member) + " of " +
                    owner.name + ", which has " + std::to_string(owner.members.size()) +
                    ". Members are counted from 0.");
  }
}

ParamId StepProgram::add_param(Param param) {
  check_operand_name("param", param.name);
  if (param.numel < 1) {
    throw UserError(quoted("param", param.name) + "has " + std::to_string(param.numel) +
                    " elements. Give at least 1.");
  }
  check_not_too_many("param", param.name, "number of elements", param.numel);
  if (param.members.empty()) param.members.push_back(param.name);
  const ParamId id{static_cast<uint32_t>(params.size())};
  operands_.emplace(param.name, id);
  params.push_back(std::move(param));
  rows_.emplace_back();
  return id;
}

ValueId StepProgram::add_value(Value value) {
  check_operand_name("value", value.name);
  check_not_negative("value", value.name, "size in bytes", value.bytes.value);
  check_not_too_many("value", value.name, "size in bytes", value.bytes.value);
  if (value.grad_of) check_param_ref("value", value.name, *value.grad_of);
  const std::optional<RowsOf> rows = value.rows_of;
  if (rows) check_rows(value.name, value.bytes, *rows);
  const ValueId id{static_cast<uint32_t>(values.size())};
  operands_.emplace(value.name, id);
  values.push_back(std::move(value));
  if (rows) read_rows(id, *rows);
  return id;
}

void StepProgram::check_rows(const std::string& name, Bytes numbers, RowsOf rows) const {
  check_param_ref("value", name, {rows.param, 0});
  const Param& owner = param(rows.param);
  const auto fail = [&](const std::string& why) {
    throw UserError(quoted("value", name) + "numbers rows of " + owner.name + ", " + why);
  };
  if (owner.placement != Placement::kSharded || owner.members.size() != 1) {
    fail("which is not a sharded parameter of one member. Exchange all of it.");
  }
  if (rows.row < 1 || owner.numel % rows.row != 0) {
    fail("whose " + std::to_string(owner.numel) + " elements are not rows of " +
         std::to_string(rows.row) + ". Correct the row.");
  }
  const int64_t row = rows_[index(rows.param)].row;
  if (row != 0 && row != rows.row) {
    fail("whose rows have " + std::to_string(row) + " elements for another value and " +
         std::to_string(rows.row) + " for this one. Correct one of them.");
  }
  if (!can_exchange(numbers, rows)) {
    fail("which are more elements on " + std::to_string(world) + " ranks than the " +
         std::to_string(kMostOfOne) + " there can be. Correct the value's size, or the row.");
  }
}

bool StepProgram::can_exchange(Bytes numbers, RowsOf rows) const {
  int64_t all = 0;
  return !__builtin_mul_overflow(numbers.value / kRowNumberBytes, rows.row, &all) &&
         !__builtin_mul_overflow(all, world, &all) && all <= kMostOfOne;
}

void StepProgram::read_rows(ValueId id, RowsOf rows) {
  Value& ids = values.at(index(id));
  check_rows(ids.name, ids.bytes, rows);
  ids.rows_of = rows;
  RowsRead& read = rows_[index(rows.param)];
  // An empty batch reads none, and still takes part in the exchange.
  read.count = std::max({read.count, ids.bytes.value / kRowNumberBytes, int64_t{1}});
  read.row = rows.row;
}

void StepProgram::forget_rows() {
  for (Value& value : values) value.rows_of.reset();
  for (RowsRead& read : rows_) read = {};
}

std::optional<ValueId> StepProgram::rows_input(const Section& section, ParamId id) const {
  const bool trains =
      section.kind == SectionKind::kForward || section.kind == SectionKind::kBackward;
  if (!trains || rows_read(id) == 0) return std::nullopt;
  const auto forward = find_section(SectionKind::kForward, section.graph);
  if (!forward) return std::nullopt;
  for (ValueId input : sections[index(*forward)].inputs) {
    const auto& rows = value(input).rows_of;
    if (rows && rows->param == id) return input;
  }
  return std::nullopt;
}

RegionId StepProgram::add_region(Region region) {
  check_name("region", region.name);
  if (region_names_.contains(region.name)) {
    throw UserError(quoted("region", region.name) +
                    "another region has this name. Rename one of them.");
  }
  check_not_negative("region", region.name, "workspace", region.workspace.value);
  check_not_too_many("region", region.name, "workspace", region.workspace.value);
  check_not_negative("region", region.name, "moved", region.moved.value);
  check_not_too_many("region", region.name, "moved", region.moved.value, kMostInAll);
  check_not_negative("region", region.name, "flops", region.flops);
  check_not_too_many("region", region.name, "flops", region.flops, kMostFlops);
  if (region.time) {
    check_not_negative("region", region.name, "time", region.time->value);
    check_not_too_many("region", region.name, "time in ns", region.time->value, kLongestTime.value);
  }
  const auto check_value = [&](ValueId id) {
    if (index(id) < values.size()) return;
    throw UserError(quoted("region", region.name) + "names value " + std::to_string(index(id)) +
                    " of " + std::to_string(values.size()) + ". Add the value first.");
  };
  for (const Operand& operand : region.inputs) {
    if (const auto* ref = std::get_if<ParamRef>(&operand)) {
      check_param_ref("region", region.name, *ref);
    } else {
      check_value(std::get<ValueId>(operand));
    }
  }
  for (ValueId id : region.outputs) check_value(id);
  const RegionId id{static_cast<uint32_t>(regions.size())};
  region_names_.emplace(region.name, id);
  regions.push_back(std::move(region));
  return id;
}

std::optional<ParamId> StepProgram::find_param(std::string_view name) const {
  const auto it = operands_.find(name);
  if (it == operands_.end() || !std::holds_alternative<ParamId>(it->second)) return std::nullopt;
  return std::get<ParamId>(it->second);
}

std::optional<ValueId> StepProgram::find_value(std::string_view name) const {
  const auto it = operands_.find(name);
  if (it == operands_.end() || !std::holds_alternative<ValueId>(it->second)) return std::nullopt;
  return std::get<ValueId>(it->second);
}

std::optional<RegionId> StepProgram::find_region(std::string_view name) const {
  const auto it = region_names_.find(name);
  if (it == region_names_.end()) return std::nullopt;
  return it->second;
}

std::optional<SectionId> StepProgram::find_section(SectionKind kind, uint32_t graph) const {
  for (size_t i = 0; i < sections.size(); ++i) {
    if (sections[i].kind == kind && sections[i].graph == graph) {
      return SectionId{static_cast<uint32_t>(i)};
    }
  }
  return std::nullopt;
}

Bytes StepProgram::full_bytes(ParamId id) const {
  return shard_bytes(id) * world;
}

Bytes StepProgram::shard_bytes(ParamId id) const {
  const Param& p = param(id);
  return Bytes{element_size(p.dtype)} * shard_numel(p.numel, world);
}

int64_t StepProgram::exchanged(ParamId id) const {
  const RowsRead& read = rows_[index(id)];
  return world * (read.count > 0 ? read.count * read.row : shard_numel(param(id).numel, world));
}

Bytes StepProgram::gather_bytes(ParamId id) const {
  return Bytes{element_size(param(id).dtype)} * exchanged(id);
}

Bytes StepProgram::reduce_bytes(ParamId id) const {
  return Bytes{element_size(reduce_dtype)} * exchanged(id);
}

}  // namespace deepcompile
