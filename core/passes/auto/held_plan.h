// SPDX-License-Identifier: Apache-2.0
// The plan that holds while `auto` makes the next one. It is a candidate as it
// is, instruction by instruction: what its choice would come to today may be
// slower, or above the budget.
#pragma once

#include <optional>

#include "passes/auto/builder.h"
#include "passes/pass.h"

namespace deepcompile {

// The instructions and reasons of the environment's held plan on `plain`, the builder's program.
// Nothing if none holds, or if it is of another step or not allowed today.
std::optional<StepProgram> held_plan(const AutoBuilder& builder, const StepProgram& plain);

// Makes `program` that plan. Its reasons stay those it was made for, but for its numbers.
void stay_with(const StepProgram& held, PassContext& context, StepProgram* program);

}  // namespace deepcompile
