// SPDX-License-Identifier: Apache-2.0
// One rank's plan on another rank's graph.
//
// Ranks may have captured one model for different shapes. What they must
// share are the collectives, and those depend on the skeleton alone: which
// parameters the runs of each section read, and which gradients they make, in
// order. Where the values agree too, all of a plan can be shared.
#pragma once

#include <string>

#include "ir/program.h"

namespace deepcompile {

// 16 hexadecimal digits over the parameters and, for each section, its runs
// with their parameters and gradients: no sizes, no names of values, regions
// or graphs. Reruns and other instructions have no part in it.
std::string skeleton(const StepProgram& program);

// The same, and which value each region reads and makes.
std::string structure(const StepProgram& program);

// `plain`, a compute-only program, with the instructions of `agreed`. If only
// the skeletons are equal, recomputation and the moves of values are left out:
// they change no collective. Throws UserError if the skeletons differ.
StepProgram transplant(const StepProgram& agreed, const StepProgram& plain);

}  // namespace deepcompile
