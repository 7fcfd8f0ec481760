// SPDX-License-Identifier: Apache-2.0
// A plan bound to the parameters and the code of this process.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "plan/plan.h"
#include "runtime/exec/region.h"
#include "runtime/memory/param_store.h"

namespace deepcompile {

// Where an input of a run comes from, resolved once.
struct LoadedInput {
  int32_t slot = -1;            // of a value; -1: a parameter's member
  bool last = false;            // the value dies with this run, and is not read again by it
  ParamState* param = nullptr;  // null: a value
  const MemberSlot* member = nullptr;
};

struct LoadedPlan {
  int64_t id = 0;
  Plan plan;
  std::vector<ParamState*> params;                 // by the plan's parameter index
  std::vector<std::shared_ptr<RegionCode>> codes;  // by code id
  // For each forward section: the value slots its graph's backward reads.
  std::vector<std::vector<int32_t>> kept;
  // By section and instruction: the inputs of a run; none for others.
  std::vector<std::vector<std::vector<LoadedInput>>> inputs;
};

// What the runtime can run, for comparison with the plan.
struct PlanLimits {
  int64_t world = 1;
  int64_t accumulation = 1;
  c10::ScalarType reduce_dtype = c10::kFloat;
};

// Parses the plan and checks it against this process. Throws UserError if the
// text or its hash is damaged, if the plan was made for other ranks or
// settings, or if a parameter, member or code is missing.
LoadedPlan load_plan(std::string_view text, std::vector<std::shared_ptr<RegionCode>> codes,
                     ParamStore& store, const PlanLimits& limits);

c10::ScalarType scalar_type(DType dtype);

}  // namespace deepcompile
