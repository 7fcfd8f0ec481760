// SPDX-License-Identifier: Apache-2.0
// split_step undoes merge_steps after the passes: a plan is made for the whole
// step, and run graph by graph.
#pragma once

#include <vector>

#include "ir/program.h"

namespace deepcompile {

// `merged` is merge_steps(name, graphs, update) with other instructions. The
// result is `graphs` and, last, `update`, with the merged program's
// instructions on their own ids; a parameter that an instruction names and the
// graph has not is added to its table. Reasons stay with the merged program.
// Throws UserError if the tables are not those of the parts.
std::vector<StepProgram> split_step(const StepProgram& merged,
                                    const std::vector<StepProgram>& graphs,
                                    const StepProgram& update);

}  // namespace deepcompile
