// SPDX-License-Identifier: Apache-2.0
#include "sim.h"

#include "ir/text.h"

namespace deepcompile::bindings {
namespace {

std::string_view word(Resource resource) {
  switch (resource) {
    case Resource::kCompute:
      return "compute";
    case Resource::kLink:
      return "link";
    case Resource::kToHost:
      return "to_host";
    case Resource::kToDevice:
      return "to_device";
    case Resource::kNone:
      return "none";
  }
  return "none";
}

// One item with its names.
struct ItemView {
  std::shared_ptr<const StepProgram> program;
  SimItem item;

  const Section& section() const { return program->sections[item.section]; }
  std::string label() const { return item_label(*program, item); }
};

py::dict as_dict(const ItemView& view) {
  py::dict result;
  result["section"] = section_name(view.section());
  result["index"] = view.item.instr;
  result["label"] = view.label();
  result["resource"] = word(view.item.resource);
  result["start_ns"] = view.item.start.value;
  result["end_ns"] = view.item.end.value;
  return result;
}

void bind_item(py::module_& m) {
  py::class_<ItemView>(
      m, "SimItem",
      "One piece of work of one execution of an instruction; most have one. Iterating\n"
      "yields (section, index, label, resource, start_ns, end_ns).")
      .def_property_readonly(
          "section", [](const ItemView& v) { return section_name(v.section()); },
          "'forward 0', 'update'.")
      .def_property_readonly("section_index", [](const ItemView& v) { return v.item.section; })
      .def_property_readonly(
          "index", [](const ItemView& v) { return v.item.instr; }, "Position in the section.")
      .def_property_readonly("micro_step", [](const ItemView& v) { return v.item.micro_step; })
      .def_property_readonly("label", &ItemView::label,
                             "What was done: 'run fwd.0', 'gather embed', or 'update embed' for\n"
                             "the deferred update that a gather applied.")
      .def_property_readonly(
          "resource", [](const ItemView& v) { return word(v.item.resource); },
          "'compute', 'link', 'to_host', 'to_device' or 'none'.")
      .def_property_readonly(
          "issue_ns", [](const ItemView& v) { return v.item.issue.value; },
          "When compute reached it.")
      .def_property_readonly("start_ns", [](const ItemView& v) { return v.item.start.value; })
      .def_property_readonly("end_ns", [](const ItemView& v) { return v.item.end.value; })
      .def_property_readonly(
          "stall_ns", [](const ItemView& v) { return v.item.stall.value; },
          "How long compute stood still for it.")
      .def("as_dict", &as_dict, "As the report page wants it.")
      .def("__iter__",
           [](const ItemView& v) {
             return py::iter(py::make_tuple(section_name(v.section()), v.item.instr, v.label(),
                                            word(v.item.resource), v.item.start.value,
                                            v.item.end.value));
           })
      .def("__repr__", [](const ItemView& v) {
        return "<SimItem " + section_name(v.section()) + " " + v.label() + ">";
      });
}

void bind_slowdown(py::module_& m) {
  m.def(
      "compute_slowdown",
      [](const StepProgram& program, const Machine& machine, const CostTable* costs) {
        return estimator_of(machine, costs)->compute_slowdown(program);
      },
      py::arg("program"), py::arg("machine"), py::arg("costs") = nullptr,
      "What simulate() multiplies kernels beside transfers between ranks by.");
}

}  // namespace

void bind_sim(py::module_& m) {
  bind_item(m);
  bind_slowdown(m);
  py::class_<Simulated>(m, "SimResult", "What a step would take: times in ns, sizes in bytes.")
      .def_property_readonly("time_ns", [](const Simulated& s) { return s.result.time.value; })
      .def_property_readonly("peak_bytes", [](const Simulated& s) { return s.result.peak.value; })
      .def_property_readonly(
          "resident_bytes", [](const Simulated& s) { return s.result.resident.value; },
          "Allocated between steps: shards, states, whole parameters, and what a step leaves.")
      .def_property_readonly(
          "stall_ns", [](const Simulated& s) { return s.result.stall.value; },
          "How long compute stood still.")
      .def_property_readonly(
          "busy",
          [](const Simulated& s) {
            py::dict busy;
            busy["compute"] = s.result.compute_busy.value;
            busy["link"] = s.result.link_busy.value;
            busy["to_host"] = s.result.to_host_busy.value;
            busy["to_device"] = s.result.to_device_busy.value;
            return busy;
          },
          "ns by resource.")
      .def_property_readonly(
          "items",
          [](const Simulated& s) {
            std::vector<ItemView> items;
            for (const SimItem& item : s.result.items) {
              items.push_back({s.program, item});
            }
            return items;
          },
          "All instructions in issue order, once for each micro-step.")
      .def_property_readonly(
          "memory",
          [](const Simulated& s) {
            std::vector<std::pair<int64_t, int64_t>> points;
            for (const MemoryPoint& point : s.result.memory) {
              points.emplace_back(point.time.value, point.bytes.value);
            }
            return points;
          },
          "[(ns, bytes allocated from then on)].")
      .def("__repr__", [](const Simulated& s) {
        return "<SimResult " + pretty(s.result.time) + ", peak " + pretty(s.result.peak) + ">";
      });
  m.def(
      "simulate",
      [](const StepProgram& program, const Machine& machine, const CostTable* costs) {
        auto copy = std::make_shared<const StepProgram>(program);
        SimResult result = simulate(*copy, *estimator_of(machine, costs));
        return Simulated{std::move(copy), std::move(result)};
      },
      py::arg("program"), py::arg("machine"), py::arg("costs") = nullptr,
      "Simulates a step of the steady state. Regions without a time get one from flops and\n"
      "bytes moved; what `costs` (a CostTable) has measured goes before the machine's numbers.");
}

}  // namespace deepcompile::bindings
