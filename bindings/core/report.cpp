// SPDX-License-Identifier: Apache-2.0
#include <tuple>

#include "base/error.h"
#include "bind.h"
#include "report/compare.h"
#include "report/explain.h"
#include "report/trace.h"
#include "sim.h"

namespace deepcompile::bindings {
namespace {

using RecordTuple = std::tuple<int32_t, uint32_t, uint32_t, int64_t, int64_t>;
using PlanList = std::vector<std::pair<int32_t, ProgramPtr>>;

std::vector<Record> records_from(const std::vector<RecordTuple>& tuples) {
  std::vector<Record> records;
  records.reserve(tuples.size());
  for (const auto& [plan, section, instr, start, end] : tuples) {
    records.push_back({plan, section, instr, Nanos{start}, Nanos{end}});
  }
  return records;
}

PlanPrograms plans_from(const PlanList& list) {
  PlanPrograms plans;
  for (const auto& [id, program] : list) plans.emplace_back(id, program.get());
  return plans;
}

std::string perfetto_trace(const std::vector<std::pair<std::string, Simulated>>& simulated,
                           const PlanList& plans, const std::vector<RecordTuple>& records,
                           const std::string& name) {
  TraceWriter trace;
  for (const auto& [label, sim] : simulated) trace.add_simulated(label, *sim.program, sim.result);
  if (!records.empty()) trace.add_measured(name, plans_from(plans), records_from(records));
  return trace.finish();
}

// Reasons may have been added since; instructions may not have changed.
void check_same(const StepProgram& program, const Simulated& sim) {
  bool same = program.sections.size() == sim.program->sections.size() &&
              program.params.size() == sim.program->params.size();
  for (size_t s = 0; same && s < program.sections.size(); ++s) {
    same = program.sections[s].instrs == sim.program->sections[s].instrs;
  }
  if (!same) {
    throw UserError(
        "[report] explain: the program has changed since it was simulated. Simulate it "
        "again.");
  }
}

void bind_kinds(py::module_& m) {
  py::class_<KindRow>(m, "KindRow", "All executions of one kind of instruction, added up.")
      .def_readonly("kind", &KindRow::kind, "'run', 'gather', ...")
      .def_readonly("executions", &KindRow::executions, "Predicted ones.")
      .def_readonly("samples", &KindRow::samples, "Measured ones.")
      .def_property_readonly("predicted_ns", [](const KindRow& r) { return r.predicted.value; })
      .def_property_readonly("measured_ns", [](const KindRow& r) { return r.measured.value; });
  m.def("compare_kinds", &compare_kinds, py::arg("rows"),
        "compare's rows added up: a KindRow for each kind of instruction that takes time.");
  m.def("kind_table", &kind_table, py::arg("rows"), "The kinds as an aligned text table.");
}

}  // namespace

void bind_report(py::module_& m) {
  bind_kinds(m);
  py::class_<CompareRow>(m, "CompareRow", "One instruction, predicted and measured.")
      .def_readonly("section", &CompareRow::section)
      .def_readonly("index", &CompareRow::instr)
      .def_readonly("label", &CompareRow::label)
      .def_property_readonly("predicted_ns",
                             [](const CompareRow& r) -> std::optional<int64_t> {
                               return r.predicted ? std::optional(r.predicted->value)
                                                  : std::nullopt;
                             })
      .def_property_readonly(
          "measured_ns",
          [](const CompareRow& r) -> std::optional<int64_t> {
            return r.measured ? std::optional(r.measured->value) : std::nullopt;
          },
          "Mean over the samples.")
      .def_readonly("samples", &CompareRow::samples)
      .def_readonly("executions", &CompareRow::executions, "Predicted ones.")
      .def_property_readonly("ratio", &CompareRow::ratio, "measured / predicted, or None.");

  m.def(
      "explain",
      [](const StepProgram& program, const Simulated& sim,
         const std::vector<Alternative>& alternatives) {
        check_same(program, sim);
        return explain(program, sim.result, alternatives);
      },
      py::arg("program"), py::arg("sim"), py::arg("alternatives") = std::vector<Alternative>{},
      "The plan in words: where each parameter lives, when it moves, what that costs, why;\n"
      "with `alternatives` (next_best) also what other choices would have cost.");
  m.def("perfetto_trace", &perfetto_trace,
        py::arg("simulated") = std::vector<std::pair<std::string, Simulated>>{},
        py::arg("plans") = PlanList{}, py::arg("records") = std::vector<RecordTuple>{},
        py::arg("name") = "measured",
        "Chrome trace JSON for ui.perfetto.dev. simulated: [(name, SimResult)]. records: the\n"
        "runtime's (plan_id, section, instr, start_ns, end_ns), with plans [(plan_id, program)]\n"
        "in the order that merge_steps took them, and the update's last.");
  m.def(
      "compare",
      [](const Simulated& sim, const PlanList& plans, const std::vector<RecordTuple>& records) {
        return compare(*sim.program, sim.result, plans_from(plans), records_from(records));
      },
      py::arg("sim"), py::arg("plans"), py::arg("records"),
      "Predicted against measured, a CompareRow for each instruction; sim is of the merged\n"
      "step, plans and records are as in perfetto_trace.");
  m.def(
      "parse_bytes", [](const std::string& text) { return parse_bytes(text).value; },
      py::arg("text"), "Bytes of a size such as '40GiB', '512MiB' or '1000B'.");
  m.def(
      "pretty_bytes", [](int64_t bytes) { return pretty(Bytes{bytes}); }, py::arg("bytes"),
      "For people: three significant digits, e.g. '1.46 GiB'.");
  m.def(
      "pretty_nanos", [](int64_t nanos) { return pretty(Nanos{nanos}); }, py::arg("nanos"),
      "For people: three significant digits, e.g. '3.20 ms'.");
  m.def("compare_table", &compare_table, py::arg("rows"), "The rows as an aligned text table.");
}

}  // namespace deepcompile::bindings
