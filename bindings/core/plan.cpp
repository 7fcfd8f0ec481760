// SPDX-License-Identifier: Apache-2.0
#include "plan/plan.h"

#include <pybind11/operators.h>

#include "bind.h"

namespace deepcompile::bindings {
namespace {

std::optional<int32_t> known(int32_t index) {
  return index >= 0 ? std::optional(index) : std::nullopt;
}

void bind_parts(py::module_& m) {
  py::class_<PlanOperand>(m, "PlanOperand", "One input of a region.")
      .def_readonly("is_param", &PlanOperand::is_param)
      .def_readonly("index", &PlanOperand::index, "Into params if is_param, else into values.")
      .def_readonly("member", &PlanOperand::member, "Of the parameter.");

  py::class_<PlanInstr>(m, "PlanInstr", "One instruction, by indices into the plan's tables.")
      .def_property_readonly("op", [](const PlanInstr& i) { return traits(i.op).name; })
      .def_property_readonly("param", [](const PlanInstr& i) { return known(i.param); })
      .def_property_readonly("region", [](const PlanInstr& i) { return known(i.region); })
      .def_readonly("values", &PlanInstr::values)
      .def_readonly("members", &PlanInstr::members,
                    "Beside values: which member of the parameter each is the gradient of.")
      .def_readonly("frees", &PlanInstr::frees, "Value slots that die after it.");

  py::class_<PlanRegion>(m, "PlanRegion")
      .def_readonly("name", &PlanRegion::name)
      .def_readonly("code", &PlanRegion::code)
      .def_readonly("inputs", &PlanRegion::inputs)
      .def_readonly("outputs", &PlanRegion::outputs);

  py::class_<PlanSection>(m, "PlanSection")
      .def_property_readonly("kind", [](const PlanSection& s) { return to_string(s.kind); })
      .def_readonly("graph", &PlanSection::graph)
      .def_readonly("inputs", &PlanSection::inputs)
      .def_readonly("outputs", &PlanSection::outputs)
      .def_readonly("instrs", &PlanSection::instrs);
}

}  // namespace

void bind_plan(py::module_& m) {
  bind_parts(m);
  py::class_<Plan>(m, "Plan", "A program frozen for the runtime.")
      .def_readonly("name", &Plan::name)
      .def_readonly("world", &Plan::world)
      .def_readonly("accumulation", &Plan::accumulation)
      .def_readonly("clip", &Plan::clip)
      .def_readonly("boundary", &Plan::boundary)
      .def_property_readonly("reduce_dtype",
                             [](const Plan& p) { return to_string(p.reduce_dtype); })
      .def_readonly("params", &Plan::params)
      .def_readonly("values", &Plan::values)
      .def_readonly("regions", &Plan::regions)
      .def_readonly("sections", &Plan::sections)
      .def_readonly("hash", &Plan::hash,
                    "16 hex digits over everything but times; equal on ranks that agree.")
      .def("serialize", &serialize, "The JSON text that parse_plan and the runtime read.")
      .def(py::self == py::self)
      .def("__hash__", [](const Plan& p) { return py::hash(py::str(p.hash)); })
      .def("__repr__", [](const Plan& p) { return "<Plan " + p.name + " " + p.hash + ">"; });
  m.def("freeze", &freeze, py::arg("program"),
        "Verifies the program and freezes it. Raises UserError if it is not complete.");
  m.def(
      "parse_plan", [](const std::string& text) { return parse_plan(text); }, py::arg("text"),
      "Reads a plan's text. Raises UserError if it is malformed or was changed.");
}

}  // namespace deepcompile::bindings
