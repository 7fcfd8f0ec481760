// SPDX-License-Identifier: Apache-2.0
// Reads off a plan what was chosen in it, whoever made it: the inverse of
// AutoBuilder. Used to ask what other choices would have cost.
#pragma once

#include "passes/auto/builder.h"

namespace deepcompile {

// `plan` was made from the builder's program by passes. Sets, place and gaps
// are exact; limits are those that `auto` noted, else the least that gather as far
// ahead as the plan does.
AutoChoice read_choice(AutoBuilder& builder, const StepProgram& plan);

}  // namespace deepcompile
