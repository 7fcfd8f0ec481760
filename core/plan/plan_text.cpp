// SPDX-License-Identifier: Apache-2.0
// The text form of a plan: JSON, one region and one instruction a line, so that
// two plans can be compared with diff.
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "base/hash.h"
#include "base/json_reader.h"
#include "plan/plan.h"

namespace deepcompile {
namespace {

using nlohmann::ordered_json;

constexpr int kVersion = 2;
constexpr const char* kWhere = "[plan] plan text";

ordered_json to_json(const PlanRegion& region) {
  ordered_json inputs = ordered_json::array();
  for (const PlanOperand& input : region.inputs) {
    if (input.is_param) {
      inputs.push_back({"param", input.index, input.member});
    } else {
      inputs.push_back(input.index);
    }
  }
  ordered_json json = {{"name", region.name}, {"code", region.code}};
  if (region.once) json["once"] = true;
  json["inputs"] = std::move(inputs);
  json["outputs"] = region.outputs;
  return json;
}

ordered_json to_json(const PlanInstr& instr) {
  ordered_json json = {{"op", traits(instr.op).name}};
  if (instr.param >= 0) json["param"] = instr.param;
  if (instr.region >= 0) json["region"] = instr.region;
  if (!instr.values.empty()) {
    json["values"] = instr.values;
    if (!instr.members.empty()) json["members"] = instr.members;
  }
  if (!instr.frees.empty()) json["frees"] = instr.frees;
  if (instr.rows >= 0) json["rows"] = instr.rows;
  return json;
}

std::string lines(const std::vector<ordered_json>& items, const std::string& indent) {
  if (items.empty()) return "[]";
  std::string text = "[";
  for (const ordered_json& item : items) {
    text += (&item == &items.front() ? "\n" : ",\n") + indent + "  " + item.dump();
  }
  return text + "\n" + indent + "]";
}

std::string section_text(const PlanSection& section) {
  std::vector<ordered_json> instrs;
  for (const PlanInstr& instr : section.instrs) instrs.push_back(to_json(instr));
  return "    {\"kind\": " + ordered_json(to_string(section.kind)).dump() +
         ", \"graph\": " + std::to_string(section.graph) +
         ", \"inputs\": " + ordered_json(section.inputs).dump() +
         ", \"outputs\": " + ordered_json(section.outputs).dump() +
         ",\n     \"instrs\": " + lines(instrs, "     ") + "}";
}

std::string text_without_hash(const Plan& plan) {
  std::vector<ordered_json> regions;
  for (const PlanRegion& region : plan.regions) regions.push_back(to_json(region));
  std::string text = "  \"version\": " + std::to_string(kVersion);
  const auto field = [&](const char* key, const ordered_json& value) {
    text += ",\n  \"" + std::string(key) + "\": " + value.dump();
  };
  field("name", plan.name);
  field("world", plan.world);
  field("accumulation", plan.accumulation);
  field("clip", plan.clip);
  field("boundary", plan.boundary);
  field("reduce_dtype", to_string(plan.reduce_dtype));
  field("params", plan.params);
  field("values", plan.values);
  text += ",\n  \"regions\": " + lines(regions, "  ") + ",\n  \"sections\": [";
  for (const PlanSection& section : plan.sections) {
    text += (&section == &plan.sections.front() ? "\n" : ",\n") + section_text(section);
  }
  return text + (plan.sections.empty() ? "]" : "\n  ]");
}

// Reads a plan; the tables' sizes bound every index.
class PlanParser {
 public:
  Plan parse(const JsonReader& root) {
    root.only({"hash", "version", "name", "world", "accumulation", "clip", "boundary",
               "reduce_dtype", "params", "values", "regions", "sections"});
    const int64_t version = root.at("version").integer(0, INT64_MAX);
    if (version != kVersion) {
      root.at("version").fail("this build reads version " + std::to_string(kVersion) + ", not " +
                              std::to_string(version) + ". Freeze the program again.");
    }
    plan_.name = root.at("name").string();
    plan_.world = root.at("world").integer(1, INT64_MAX);
    plan_.accumulation = root.at("accumulation").integer(1, kMostAccumulation);
    plan_.clip = root.at("clip").boolean();
    plan_.boundary = root.at("boundary").boolean();
    if (!parse_dtype(root.at("reduce_dtype").string(), &plan_.reduce_dtype)) {
      root.at("reduce_dtype").fail("unknown element type. Known: f32, f16, bf16, f64.");
    }
    for (const JsonReader& name : root.at("params").elements()) {
      plan_.params.push_back(name.string());
    }
    for (const JsonReader& name : root.at("values").elements()) {
      plan_.values.push_back(name.string());
    }
    for (const JsonReader& region : root.at("regions").elements()) parse_region(region);
    for (const JsonReader& section : root.at("sections").elements()) parse_section(section);
    plan_.hash = root.at("hash").string();
    return plan_;
  }

 private:
  static int32_t index_below(const JsonReader& reader, size_t size, const char* table) {
    const int64_t value = reader.integer(INT32_MIN, INT32_MAX);
    if (value < 0 || value >= static_cast<int64_t>(size)) {
      reader.fail("index " + std::to_string(value) + " is outside the table of " +
                  std::to_string(size) + " " + table + ". Is the text complete and unedited?");
    }
    return static_cast<int32_t>(value);
  }

  std::vector<int32_t> value_list(const JsonReader& reader) const {
    std::vector<int32_t> list;
    for (const JsonReader& element : reader.elements()) {
      list.push_back(index_below(element, plan_.values.size(), "values"));
    }
    return list;
  }

  PlanOperand operand(const JsonReader& reader) const {
    if (!reader.node().is_array()) {
      return {false, index_below(reader, plan_.values.size(), "values"), 0};
    }
    const auto parts = reader.elements();
    if (parts.size() != 3 || parts[0].string() != "param") {
      reader.fail("must be a value's index or [\"param\", index, member].");
    }
    return {true, index_below(parts[1], plan_.params.size(), "params"),
            static_cast<int32_t>(parts[2].integer(0, INT32_MAX))};
  }

  void parse_region(const JsonReader& reader) {
    reader.only({"name", "code", "once", "inputs", "outputs"});
    PlanRegion region;
    region.name = reader.at("name").string();
    region.code = static_cast<uint32_t>(reader.at("code").integer(0, UINT32_MAX));
    if (const auto once = reader.find("once")) region.once = once->boolean();
    for (const JsonReader& input : reader.at("inputs").elements()) {
      region.inputs.push_back(operand(input));
    }
    region.outputs = value_list(reader.at("outputs"));
    plan_.regions.push_back(std::move(region));
  }

  PlanInstr parse_instr(const JsonReader& reader) const {
    reader.only({"op", "param", "region", "values", "members", "frees", "rows"});
    PlanInstr instr;
    const std::string word = reader.at("op").string();
    const auto op = deepcompile::parse_op(word);
    if (!op) reader.at("op").fail("unknown instruction \"" + word + "\".");
    instr.op = *op;
    const OpTraits& wants = traits(*op);
    if (wants.takes_param) {
      instr.param = index_below(reader.at("param"), plan_.params.size(), "params");
    }
    if (wants.takes_region) {
      instr.region = index_below(reader.at("region"), plan_.regions.size(), "regions");
    }
    if (wants.takes_values) {
      instr.values = value_list(reader.at("values"));
    }
    if (*op == Op::kReduce) {
      for (const JsonReader& member : reader.at("members").elements()) {
        instr.members.push_back(static_cast<int32_t>(member.integer(0, INT32_MAX)));
      }
      if (instr.members.size() != instr.values.size()) {
        reader.at("members").fail("must have one entry for each of \"values\".");
      }
    }
    if (const auto frees = reader.find("frees")) instr.frees = value_list(*frees);
    if (const auto rows = reader.find("rows")) {
      instr.rows = index_below(*rows, plan_.values.size(), "values");
    }
    return instr;
  }

  void parse_section(const JsonReader& reader) {
    reader.only({"kind", "graph", "inputs", "outputs", "instrs"});
    PlanSection section;
    const std::string word = reader.at("kind").string();
    const auto kind = parse_section_kind(word);
    if (!kind) {
      reader.at("kind").fail("unknown kind \"" + word +
                             "\". Known: forward, backward, inference, update.");
    }
    section.kind = *kind;
    section.graph = static_cast<uint32_t>(reader.at("graph").integer(0, UINT32_MAX));
    section.inputs = value_list(reader.at("inputs"));
    section.outputs = value_list(reader.at("outputs"));
    for (const JsonReader& instr : reader.at("instrs").elements()) {
      section.instrs.push_back(parse_instr(instr));
    }
    plan_.sections.push_back(std::move(section));
  }

  Plan plan_;
};

}  // namespace

std::string content_hash(const Plan& plan) {
  Hash hash;
  hash.add(text_without_hash(plan));
  return hash.digits();
}

std::string serialize(const Plan& plan) {
  return "{\n  \"hash\": \"" + plan.hash + "\",\n" + text_without_hash(plan) + "\n}\n";
}

Plan parse_plan(std::string_view text) {
  const nlohmann::json document = parse_json(text, kWhere);
  const JsonReader root(document, kWhere);
  Plan plan = PlanParser().parse(root);
  const std::string expected = content_hash(plan);
  if (plan.hash != expected) {
    root.at("hash").fail("is " + plan.hash + ", the content's is " + expected +
                         ". The text was changed: freeze the program again.");
  }
  return plan;
}

}  // namespace deepcompile
