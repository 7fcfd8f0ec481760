// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "bind.h"
#include "cost/cost_model.h"
#include "cost/cost_table.h"

namespace deepcompile::bindings {
namespace {

namespace fs = std::filesystem;

// The package's machines/ folder, wherever the package is installed.
fs::path machines_folder() {
  for (const py::handle& entry : py::module_::import("deepcompile").attr("__path__")) {
    const fs::path folder = fs::path(py::cast<std::string>(entry)) / "machines";
    if (fs::is_directory(folder)) return folder;
  }
  throw InternalError("the package deepcompile has no folder machines/");
}

std::vector<std::string> builtin_names() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(machines_folder())) {
    if (entry.path().extension() == ".json") names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

Machine builtin(const std::string& name) {
  const std::vector<std::string> names = builtin_names();
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    std::string known;
    for (const std::string& each : names) known += (known.empty() ? "" : ", ") + each;
    throw UserError("[cost] machine " + name + ": there is no built-in of that name. Use one of " +
                    known + ", or the path of a JSON file.");
  }
  return load_machine((machines_folder() / (name + ".json")).string());
}

py::dict link_dict(const Link& link) {
  py::dict result;
  result["gather_bandwidth"] = link.gather_bandwidth;
  result["reduce_bandwidth"] = link.reduce_bandwidth;
  result["latency_ns"] = link.latency.value;
  result["compute_slowdown"] = link.compute_slowdown;
  return result;
}

py::dict host_dict(const HostLink& host) {
  py::dict result;
  result["to_device_bandwidth"] = host.to_device_bandwidth;
  result["to_host_bandwidth"] = host.to_host_bandwidth;
  result["to_device_beside"] = host.beside.to_device;
  result["to_host_beside"] = host.beside.to_host;
  return result;
}

int64_t collective_ns(const Machine& machine, const std::string& kind, int64_t world,
                      int64_t bytes) {
  if (world < 1 || bytes < 0) {
    throw UserError("[cost] collective: world and bytes must be positive.");
  }
  if (kind == "all_gather") {
    return collective_time(machine, Collective::kAllGather, world, Bytes{bytes}).value;
  }
  if (kind == "reduce_scatter") {
    return collective_time(machine, Collective::kReduceScatter, world, Bytes{bytes}).value;
  }
  throw UserError("[cost] collective " + kind + ": unknown. Use all_gather or reduce_scatter.");
}

using CurvePoints = std::vector<std::pair<int64_t, int64_t>>;

CurveKind curve_kind(const std::string& word) {
  if (const auto kind = parse_curve_kind(word)) return *kind;
  std::string known;
  for (int i = 0; i < kCurveKindCount; ++i) {
    known += (i == 0 ? "" : ", ") + std::string(to_string(static_cast<CurveKind>(i)));
  }
  throw UserError("[cost] cost table: there is no curve " + word + ". Known: " + known + ".");
}

void set_curve(CostTable& table, const std::string& word, const CurvePoints& pairs) {
  std::vector<Curve::Point> points;
  for (const auto& [bytes, ns] : pairs) points.emplace_back(Bytes{bytes}, Nanos{ns});
  table.curve(curve_kind(word)) = Curve(std::move(points), "[cost] cost table: " + word);
}

CurvePoints curve_points(const CostTable& table, const std::string& word) {
  CurvePoints pairs;
  for (const auto& [bytes, time] : table.curve(curve_kind(word)).points()) {
    pairs.emplace_back(bytes.value, time.value);
  }
  return pairs;
}

void set_slowdown(CostTable& table, std::optional<double> slowdown) {
  if (slowdown && !(*slowdown >= 1 && *slowdown <= 100)) {
    throw UserError(
        "[cost] cost table: compute_slowdown must be from 1 (transfers do not disturb "
        "kernels) to 100.");
  }
  table.compute_slowdown = slowdown;
}

using Fraction = std::optional<double> CostTable::*;

template <Fraction kept>
void set_beside(CostTable& table, std::optional<double> value) {
  if (value && !is_fraction(*value)) {
    throw UserError(
        "[cost] cost table: to_device_beside and to_host_beside must be from 0.01 to 1 "
        "(directions do not disturb each other).");
  }
  table.*kept = value;
}

void set_overhead(CostTable& table, std::optional<int64_t> ns) {
  if (ns && *ns < 0) throw UserError("[cost] cost table: run_overhead_ns must be 0 or more.");
  table.run_overhead = ns ? std::optional(Nanos{*ns}) : std::nullopt;
}

void set_section_overhead(CostTable& table, const std::string& word, std::optional<int64_t> ns) {
  const auto kind = parse_section_kind(word);
  if (!kind) {
    throw UserError("[cost] cost table: there is no kind of section " + word +
                    ". Known: forward, backward, inference, update.");
  }
  if (ns && *ns < 0) throw UserError("[cost] cost table: a section's overhead must be 0 or more.");
  table.overhead(*kind) = ns ? std::optional(Nanos{*ns}) : std::nullopt;
}

CostTable new_table(int64_t world) {
  if (world < 1) throw UserError("[cost] cost table: world must be 1 or more.");
  CostTable table;
  table.world = world;
  return table;
}

void bind_norm(py::module_& m) {
  m.def(
      "norm_bytes", [](const StepProgram& program) { return norm_bytes(program).value; },
      py::arg("program"), "Of all gradient shards of a rank: what the norm reads.");
}

void bind_cost_table(py::module_& m) {
  bind_norm(m);
  py::class_<CostTable>(m, "CostTable",
                        "What was measured on the machine a job runs on; goes before a Machine's\n"
                        "numbers. Curves are gather, reduce (bytes of the whole), to_host,\n"
                        "to_device (of one tensor), update, accumulate (of a rank's shard), norm\n"
                        "(of all a rank's gradients), staging (of the whole gradient).")
      .def(py::init(&new_table), py::arg("world"), "Empty; `world` ranks take the measurements.")
      .def_static(
          "parse",
          [](const std::string& text, const std::string& where) {
            return parse_cost_table(text, where);
          },
          py::arg("text"), py::arg("where") = "cost table", "Reads what serialize() wrote.")
      .def(
          "serialize", [](const CostTable& table) { return serialize(table); }, "JSON.")
      .def_readonly("world", &CostTable::world)
      .def("set_curve", &set_curve, py::arg("kind"), py::arg("points"),
           "Sets a curve from [(bytes, ns)], sizes rising; [] takes it away. Between points\n"
           "times are interpolated, above the last its slope goes on, below the first its\n"
           "time counts: give (0, ns) for what has no latency.")
      .def("curve", &curve_points, py::arg("kind"), "Its points, [] if there is none.")
      .def_property(
          "compute_slowdown", [](const CostTable& table) { return table.compute_slowdown; },
          &set_slowdown, "Kernels beside a transfer take this many times as long; or None.")
      .def_property(
          "to_device_beside", [](const CostTable& table) { return table.to_device_beside; },
          &set_beside<&CostTable::to_device_beside>,
          "The fraction of its speed that this direction of the host link keeps while the other\n"
          "one is busy; or None.")
      .def_property(
          "to_host_beside", [](const CostTable& table) { return table.to_host_beside; },
          &set_beside<&CostTable::to_host_beside>, "As to_device_beside.")
      .def_property(
          "run_overhead_ns",
          [](const CostTable& table) -> std::optional<int64_t> {
            return table.run_overhead ? std::optional(table.run_overhead->value) : std::nullopt;
          },
          &set_overhead, "Added to every measured run; or None.")
      .def("set_section_overhead", &set_section_overhead, py::arg("kind"), py::arg("ns"),
           "What the user's code takes before a section of this kind, with nothing to wait for;\n"
           "None takes it away.")
      .def(
          "section_overhead",
          [](CostTable& table, const std::string& word) -> std::optional<int64_t> {
            const auto kind = parse_section_kind(word);
            if (!kind || !table.overhead(*kind)) return std::nullopt;
            return table.overhead(*kind)->value;
          },
          py::arg("kind"), "ns; None if it was not measured.")
      .def("__eq__", [](const CostTable& a, const CostTable& b) { return a == b; });
}

}  // namespace

void bind_cost(py::module_& m) {
  bind_cost_table(m);
  py::class_<Machine>(m, "Machine", "What the cost model knows about a cluster.")
      .def_static(
          "parse",
          [](const std::string& text, const std::string& where) {
            return parse_machine(text, where);
          },
          py::arg("text"), py::arg("where") = "machine", "Reads a JSON description.")
      .def_static("load", &load_machine, py::arg("path"), "Reads a JSON file.")
      .def_static("builtin", &builtin, py::arg("name"), "One of builtin_names().")
      .def_static("builtin_names", &builtin_names)
      .def_readonly("name", &Machine::name)
      .def_readonly("nodes", &Machine::nodes)
      .def_readonly("ranks_per_node", &Machine::ranks_per_node)
      .def_property_readonly("ranks", &Machine::ranks)
      .def_property_readonly("device_name", [](const Machine& x) { return x.device.name; })
      .def_property_readonly(
          "memory_bytes", [](const Machine& x) { return x.device.memory.value; },
          "What one rank can allocate.")
      .def_property_readonly(
          "flops",
          [](const Machine& x) {
            py::dict result;
            for (const auto& [dtype, rate] : x.device.flops) {
              result[py::str(std::string(to_string(dtype)))] = rate;
            }
            return result;
          },
          "Peak operations a second by element type.")
      .def_property_readonly(
          "intra", [](const Machine& x) { return link_dict(x.intra); },
          "The link between ranks of a node, as in the file.")
      .def_property_readonly(
          "inter",
          [](const Machine& x) -> py::object {
            if (!x.inter) return py::none();
            return link_dict(*x.inter);
          },
          "The link between nodes, or None.")
      .def_property_readonly(
          "host", [](const Machine& x) { return host_dict(x.host); },
          "The link to the host: bytes a second a rank, and the fraction of them that a direction\n"
          "keeps while the other one is busy.")
      .def_readonly("notes", &Machine::notes, "Where the numbers come from.")
      .def("__repr__", [](const Machine& x) { return "<Machine " + x.name + ">"; });
  m.def("analytic_costs", &fill_analytic_times, py::arg("program"), py::arg("machine"),
        "Sets the time of every region that has none, from its flops and bytes moved.\n"
        "Returns how many it set.");
  m.def("collective_ns", &collective_ns, py::arg("machine"), py::arg("kind"), py::arg("world"),
        py::arg("bytes"),
        "Nanoseconds of an 'all_gather' or 'reduce_scatter' of `bytes` (the whole, not the\n"
        "shard) over `world` ranks.");
}

}  // namespace deepcompile::bindings
