// SPDX-License-Identifier: Apache-2.0
// Executor: walks one section of a loaded plan.
//
// It decides nothing: every instruction, its order and what dies after it are
// the plan's. An error inside a section leaves the runtime usable: transfers
// under way are ended, what the section gathered is given back, the call's
// values are dropped.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/exec/call_table.h"
#include "runtime/exec/loaded_plan.h"
#include "runtime/memory/param_store.h"
#include "runtime/optimizer/sharded_adam.h"
#include "runtime/trace.h"

namespace deepcompile {

class Executor {
 public:
  Executor(ParamStore& store, ShardedAdam& optimizer, Tracer& tracer, int64_t rank,
           c10::Device device);

  // Runs a section on `values`, one slot per value of the plan. Inputs must be
  // in their slots; outputs are there afterwards. Throws UserError naming rank
  // and instruction if a transfer fails.
  void run(const LoadedPlan& loaded, size_t section, std::vector<RuntimeValue>* values);

 private:
  // Where the executor is, for messages and traces.
  struct Place {
    const LoadedPlan* loaded;
    size_t section;
    size_t instr;
    const PlanInstr& get() const { return loaded->plan.sections[section].instrs[instr]; }
  };

  void step(const Place& place, std::vector<RuntimeValue>* values);
  void run_region(const Place& place, std::vector<RuntimeValue>* values);
  void reduce(const Place& place, const std::vector<RuntimeValue>& values,
              std::shared_ptr<Span> span);
  void recover(bool reachable);
  std::string describe(const Place& place) const;

  ParamStore& store_;
  ShardedAdam& optimizer_;
  Tracer& tracer_;
  int64_t rank_;
  c10::Device device_;
  std::vector<ParamState*> gathered_;  // by this section, not yet released
};

}  // namespace deepcompile
