// SPDX-License-Identifier: Apache-2.0
// Pipelines with an environment: an estimator, the simulator, a budget.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "ir/text.h"
#include "passes/pipeline.h"
#include "sim/simulator.h"

namespace deepcompile {

// `costs` outlives the result.
inline PipelineOptions planned_for(const Estimator& costs,
                                   std::optional<Bytes> budget = std::nullopt) {
  PipelineOptions options;
  options.environment.memory_budget = budget;
  options.environment.estimator = &costs;
  options.environment.simulator = simulate_summary;
  return options;
}

// Runs, reductions, accumulations and updates of each section, in order: what
// passes that move or drop gathers and releases leave alone.
inline std::string work_of(const StepProgram& program) {
  std::string out;
  for (const Section& section : program.sections) {
    out += section_name(section) + ":";
    for (const Instr& instr : section.instrs) {
      if (instr.op == Op::kGather || instr.op == Op::kWait || instr.op == Op::kRelease) continue;
      out += " " + print(program, instr);
    }
    out += "\n";
  }
  return out;
}

// The texts of the reasons that `pass` gave for `object`.
inline std::vector<std::string> reasons_for(const StepProgram& program, const std::string& pass,
                                            const std::string& object) {
  std::vector<std::string> out;
  for (const Reason& each : program.reasons) {
    if (each.pass == pass && each.object == object) out.push_back(each.text);
  }
  return out;
}

}  // namespace deepcompile
