// SPDX-License-Identifier: Apache-2.0
#include "report/trace.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "analysis/footprint.h"
#include "ir/text.h"

namespace deepcompile {
namespace {

using nlohmann::ordered_json;

// Thread ids order the rows of a process.
int thread_of(Resource resource) {
  switch (resource) {
    case Resource::kCompute:
      return 1;
    case Resource::kLink:
      return 2;
    case Resource::kToHost:
      return 4;
    case Resource::kToDevice:
      return 5;
    case Resource::kNone:
      return 3;
  }
  return 3;
}

double micros(Nanos time) {
  return static_cast<double>(time.value) / 1000.0;
}

// What the instruction is about: a whole parameter, its states, or values.
std::optional<Bytes> bytes_of(const StepProgram& program, const Instr& instr) {
  if (instr.param) {
    const Resource resource = traits(instr.op).resource;
    const bool states = resource == Resource::kToHost || resource == Resource::kToDevice;
    if (states) return footprint(program, *instr.param).states();
    const bool rows = program.rows_read(*instr.param) > 0;
    if (rows && instr.op == Op::kGather) return program.gather_bytes(*instr.param);
    if (rows && instr.op == Op::kReduce) return program.reduce_bytes(*instr.param);
    return program.full_bytes(*instr.param);
  }
  if (instr.values.empty()) return std::nullopt;
  Bytes bytes;
  for (ValueId id : instr.values) bytes += program.value(id).bytes;
  return bytes;
}

std::string dump(const ordered_json& json) {
  return json.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

}  // namespace

void TraceWriter::begin_process(const std::string& name) {
  ++process_;
  events_.push_back(
      dump({{"name", "process_name"}, {"ph", "M"}, {"pid", process_}, {"args", {{"name", name}}}}));
  const std::pair<Resource, const char*> threads[] = {{Resource::kCompute, "compute"},
                                                      {Resource::kLink, "link"},
                                                      {Resource::kNone, "waits"},
                                                      {Resource::kToHost, "to host"},
                                                      {Resource::kToDevice, "to device"}};
  for (const auto& [resource, thread] : threads) {
    events_.push_back(dump({{"name", "thread_name"},
                            {"ph", "M"},
                            {"pid", process_},
                            {"tid", thread_of(resource)},
                            {"args", {{"name", thread}}}}));
  }
}

void TraceWriter::event(const StepProgram& program, const Instr& instr, const std::string& section,
                        Resource resource, Nanos start, Nanos end) {
  if (end <= start) return;
  ordered_json args = {{"section", section}};
  if (const auto bytes = bytes_of(program, instr)) args["bytes"] = bytes->value;
  if (instr.region) {
    const Region& region = program.region(*instr.region);
    args["code"] = region.code;
    args["flops"] = region.flops;
    args["moved"] = region.moved.value;
  }
  events_.push_back(dump({{"name", instr_label(program, instr)},
                          {"cat", traits(instr.op).name},
                          {"ph", "X"},
                          {"pid", process_},
                          {"tid", thread_of(resource)},
                          {"ts", micros(start)},
                          {"dur", micros(end - start)},
                          {"args", std::move(args)}}));
}

void TraceWriter::memory(const SimResult& result) {
  for (const MemoryPoint& point : result.memory) {
    events_.push_back(dump({{"name", "memory"},
                            {"ph", "C"},
                            {"pid", process_},
                            {"ts", micros(point.time)},
                            {"args", {{"bytes", point.bytes.value}}}}));
  }
}

void TraceWriter::add_simulated(const std::string& name, const StepProgram& program,
                                const SimResult& result) {
  begin_process(name);
  for (const SimItem& item : result.items) {
    const Section& section = program.sections.at(item.section);
    Instr instr = section.instrs.at(item.instr);
    const std::string where = section_name(section);
    if (item.stall > Nanos{0}) {
      event(program, instr, where, Resource::kNone, item.issue, item.issue + item.stall);
    }
    if (item.resource != Resource::kNone) {
      instr.op = item.op;  // e.g. the update that a gather applied
      event(program, instr, where, item.resource, item.start, item.end);
    }
  }
  memory(result);
}

void TraceWriter::add_measured(const std::string& name, const PlanPrograms& plans,
                               const std::vector<Record>& records) {
  begin_process(name);
  if (records.empty()) return;
  const RecordNames names(plans);
  const Nanos origin =
      std::min_element(records.begin(), records.end(), [](const Record& a, const Record& b) {
        return a.start < b.start;
      })->start;
  for (const Record& record : records) {
    const auto [program, instr, section] = names.find(record);
    event(*program, *instr, section, traits(instr->op).resource, record.start - origin,
          record.end - origin);
  }
}

std::string TraceWriter::finish() const {
  std::string text = "{\"displayTimeUnit\": \"ms\", \"traceEvents\": [";
  for (size_t i = 0; i < events_.size(); ++i) text += (i == 0 ? "\n" : ",\n") + events_[i];
  return text + "\n]}\n";
}

}  // namespace deepcompile
