// SPDX-License-Identifier: Apache-2.0
// The edits of place_optimizer: one program in, the same with its updates
// elsewhere out. What is chosen, and why, is place_optimizer.cpp's.
#pragma once

#include <string>
#include <vector>

#include "passes/place_optimizer.h"
#include "passes/section_edit.h"

namespace deepcompile {

struct PlacedUpdate {
  ParamId param{};
  uint32_t section = 0;   // where its update stands now
  int runs_ahead = 0;     // next_forward: runs between the update and the first use
  std::string kept = {};  // not empty: it stays in the update section, and why
};

struct OptimizerPlacement {
  SectionInstrs instrs;
  std::vector<PlacedUpdate> updates;  // one a parameter that the update section updates, by id
};

// `program` holds an update section; places but kStep want all its updates there.
OptimizerPlacement place_in_next_forward(const StepProgram& program, int ahead);
OptimizerPlacement place_in_backward(const StepProgram& program);

}  // namespace deepcompile
