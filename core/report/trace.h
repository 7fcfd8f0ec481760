// SPDX-License-Identifier: Apache-2.0
// Timelines in the Chrome trace format, for https://ui.perfetto.dev.
//
// One process per source (prediction, each rank), with one thread for compute,
// one for the link between ranks, one for each direction of the host link, one
// for waits, and a counter of allocated memory.
#pragma once

#include <string>
#include <vector>

#include "ir/program.h"
#include "report/records.h"
#include "sim/simulator.h"

namespace deepcompile {

class TraceWriter {
 public:
  // Adds one process called `name`. Times begin at 0.
  void add_simulated(const std::string& name, const StepProgram& program, const SimResult& result);
  // As above; the earliest record is at 0.
  void add_measured(const std::string& name, const PlanPrograms& plans,
                    const std::vector<Record>& records);

  // The JSON text of all that was added.
  std::string finish() const;

 private:
  void begin_process(const std::string& name);
  void event(const StepProgram& program, const Instr& instr, const std::string& section,
             Resource resource, Nanos start, Nanos end);
  void memory(const SimResult& result);

  int process_ = 0;
  std::vector<std::string> events_;
};

}  // namespace deepcompile
