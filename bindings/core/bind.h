// SPDX-License-Identifier: Apache-2.0
// The parts of module _core. Bindings translate and decide nothing: ids become
// names, enums become words, Bytes and Nanos become integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ir/program.h"

namespace deepcompile::bindings {

namespace py = pybind11;

void bind_ir(py::module_& m);
void bind_passes(py::module_& m);
void bind_pass_library(py::module_& m);
void bind_plan(py::module_& m);
void bind_cost(py::module_& m);
void bind_sim(py::module_& m);
void bind_report(py::module_& m);

using ProgramPtr = std::shared_ptr<StepProgram>;

// An instruction by names, as Python sees it.
struct InstrNames {
  std::string op;
  std::optional<std::string> operand;  // the parameter's or region's name
  std::vector<std::string> values;

  bool operator==(const InstrNames&) const = default;
};

InstrNames to_names(const StepProgram& program, const Instr& instr);
// Throws UserError if a name is unknown or the operands do not fit the instruction.
Instr from_names(const StepProgram& program, const InstrNames& names);

// A parameter's name as a program writes it: other characters become `_`.
std::string ir_name(std::string_view name);
DType dtype_from(const std::string& word);
std::vector<std::string> names_of(const StepProgram& program, const std::vector<ValueId>& ids);
std::vector<ValueId> values_from(const StepProgram& program, const std::vector<std::string>& names);

}  // namespace deepcompile::bindings
