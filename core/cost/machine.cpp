// SPDX-License-Identifier: Apache-2.0
#include "cost/machine.h"

#include <fstream>
#include <sstream>

#include "base/error.h"
#include "base/json_reader.h"

namespace deepcompile {
namespace {

constexpr int64_t kMostNanos = 1'000'000'000;  // an overhead above a second is a slip of units

double fraction(const JsonReader& reader, const std::string& of = "the peak") {
  const double value = reader.positive();
  if (value > 1) reader.fail("must be at most 1: it is a fraction of " + of + ".");
  return value;
}

double beside(const JsonReader& reader) {
  const double value = fraction(reader, "the direction's own speed");
  if (!is_fraction(value)) reader.fail("must be at least 0.01: measure it, or leave it out.");
  return value;
}

Nanos overhead(const JsonReader& reader) {
  return {reader.integer(0, kMostNanos)};
}

Device read_device(const JsonReader& reader) {
  reader.only({"name", "flops", "compute_efficiency", "memory_bandwidth", "memory_efficiency",
               "memory_bytes", "launch_overhead_ns"});
  Device device;
  device.name = reader.at("name").string();
  const JsonReader flops = reader.at("flops");
  for (const std::string& key : flops.keys()) {
    DType dtype;
    if (!parse_dtype(key, &dtype)) {
      flops.fail("unknown element type \"" + key + "\". Known: f32, f16, bf16, f64.");
    }
    device.flops[dtype] = flops.at(key).positive();
  }
  if (device.flops.empty()) flops.fail("needs at least one element type, e.g. \"f32\": 1e12.");
  device.compute_efficiency = fraction(reader.at("compute_efficiency"));
  device.memory_bandwidth = reader.at("memory_bandwidth").positive();
  device.memory_efficiency = fraction(reader.at("memory_efficiency"));
  device.memory = {reader.at("memory_bytes").integer(1, kMostInAll)};
  device.launch_overhead = overhead(reader.at("launch_overhead_ns"));
  return device;
}

Link read_link(const JsonReader& reader) {
  reader.only({"gather_bandwidth", "reduce_bandwidth", "latency_ns", "compute_slowdown"});
  Link link;
  link.gather_bandwidth = reader.at("gather_bandwidth").positive();
  link.reduce_bandwidth = reader.at("reduce_bandwidth").positive();
  link.latency = overhead(reader.at("latency_ns"));
  const JsonReader slowdown = reader.at("compute_slowdown");
  link.compute_slowdown = slowdown.number();
  if (link.compute_slowdown < 1 || link.compute_slowdown > 100) {
    slowdown.fail("must be from 1 (transfers do not disturb kernels) to 100.");
  }
  return link;
}

HostLink read_host(const JsonReader& reader) {
  reader.only({"to_device_bandwidth", "to_host_bandwidth", "to_device_beside", "to_host_beside"});
  HostLink host;
  host.to_device_bandwidth = reader.at("to_device_bandwidth").positive();
  host.to_host_bandwidth = reader.at("to_host_bandwidth").positive();
  if (const auto kept = reader.find("to_device_beside")) host.beside.to_device = beside(*kept);
  if (const auto kept = reader.find("to_host_beside")) host.beside.to_host = beside(*kept);
  return host;
}

}  // namespace

Machine parse_machine(std::string_view json, const std::string& where) {
  const std::string stage = "[cost] " + where;
  const nlohmann::json document = parse_json(json, stage);
  const JsonReader root(document, stage);
  root.only({"name", "nodes", "ranks_per_node", "device", "links", "host", "notes"});
  Machine machine;
  machine.name = root.at("name").string();
  machine.nodes = root.at("nodes").integer(1, kMostRanks);
  machine.ranks_per_node = root.at("ranks_per_node").integer(1, kMostRanks);
  machine.device = read_device(root.at("device"));

  const JsonReader links = root.at("links");
  links.only({"intra", "inter"});
  machine.intra = read_link(links.at("intra"));
  if (const auto inter = links.find("inter")) machine.inter = read_link(*inter);
  if (machine.nodes > 1 && !machine.inter) {
    links.fail("the key \"inter\" is missing: " + std::to_string(machine.nodes) +
               " nodes need a link between them.");
  }

  machine.host = read_host(root.at("host"));
  if (const auto notes = root.find("notes")) {
    for (const std::string& key : notes->keys()) machine.notes[key] = notes->at(key).string();
  }
  return machine;
}

Machine load_machine(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  // An empty file fails `text`; a folder opens, and fails the first look.
  const bool readable = file && (file.peek(), !file.bad());
  if (readable) text << file.rdbuf();
  if (!readable) {
    throw UserError(
        "[cost] machine file " + path +
        ": cannot be read. Give the path of a JSON file, or a built-in machine's name.");
  }
  return parse_machine(text.str(), path);
}

}  // namespace deepcompile
