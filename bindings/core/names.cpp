// SPDX-License-Identifier: Apache-2.0
#include <cctype>
#include <string>
#include <string_view>

#include "base/error.h"
#include "bind.h"

namespace deepcompile::bindings {
namespace {

constexpr size_t kNone = std::string_view::npos;

[[noreturn]] void wrong(const InstrNames& names, const std::string& text) {
  throw UserError("[ir] instruction " + names.op +
                  (names.operand ? " " + *names.operand : std::string()) + ": " + text);
}

}  // namespace

std::string ir_name(std::string_view name) {
  std::string out;
  for (const char c : name) {
    const auto byte = static_cast<unsigned char>(c);
    if ((byte & 0xc0) == 0x80) continue;  // goes on with a character that is one `_` already
    const bool stays = std::isalnum(byte) != 0 || std::string_view("_.:/-").find(c) != kNone;
    out += stays ? c : '_';
  }
  const bool begins =
      !out.empty() && (std::isalpha(static_cast<unsigned char>(out[0])) != 0 || out[0] == '_');
  return begins ? out : "_" + out;
}

DType dtype_from(const std::string& word) {
  DType dtype;
  if (!parse_dtype(word, &dtype)) {
    throw UserError("[ir] dtype " + word + ": unknown. Use f32, f16, bf16 or f64.");
  }
  return dtype;
}

std::vector<std::string> names_of(const StepProgram& program, const std::vector<ValueId>& ids) {
  std::vector<std::string> names;
  names.reserve(ids.size());
  for (ValueId id : ids) names.push_back(program.value(id).name);
  return names;
}

std::vector<ValueId> values_from(const StepProgram& program,
                                 const std::vector<std::string>& names) {
  std::vector<ValueId> ids;
  ids.reserve(names.size());
  for (const std::string& name : names) {
    const auto id = program.find_value(name);
    if (!id) throw UserError("[ir] value " + name + ": unknown. Add it with add_value first.");
    ids.push_back(*id);
  }
  return ids;
}

InstrNames to_names(const StepProgram& program, const Instr& instr) {
  InstrNames names{std::string(traits(instr.op).name), {}, names_of(program, instr.values)};
  if (instr.param) names.operand = program.param(*instr.param).name;
  if (instr.region) names.operand = program.region(*instr.region).name;
  return names;
}

Instr from_names(const StepProgram& program, const InstrNames& names) {
  const auto op = parse_op(names.op);
  if (!op) {
    std::string known;
    for (int i = 0; i < kOpCount; ++i) {
      known += (i == 0 ? "" : ", ") + std::string(traits(static_cast<Op>(i)).name);
    }
    wrong(names, "unknown. Use one of " + known + ".");
  }
  const OpTraits& wants = traits(*op);
  Instr instr;
  instr.op = *op;
  if (names.operand.has_value() != (wants.takes_param || wants.takes_region)) {
    wrong(names, wants.takes_param    ? "needs a parameter's name."
                 : wants.takes_region ? "needs a region's name."
                                      : "takes no operand. Leave it out.");
  }
  if (wants.takes_param) {
    instr.param = program.find_param(*names.operand);
    if (!instr.param) wrong(names, "unknown parameter. Add it with add_param first.");
  }
  if (wants.takes_region) {
    instr.region = program.find_region(*names.operand);
    if (!instr.region) wrong(names, "unknown region. Add it with add_region first.");
  }
  if (!wants.takes_values && !names.values.empty()) wrong(names, "takes no values.");
  instr.values = values_from(program, names.values);
  return instr;
}

}  // namespace deepcompile::bindings
