// SPDX-License-Identifier: Apache-2.0
// What a pass may not do to runs though the program stays valid: regions that draw random numbers
// or write to what they read (Region::once) keep their order, and every run of a region that reads
// an input of the model that such a one reads stays on its side of it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ir/program.h"
#include "passes/section_edit.h"

namespace deepcompile {

// By value that is an input of its graph: the `once` regions that read it, forward or backward,
// and may write to it.
std::vector<std::vector<RegionId>> input_writers(const StepProgram& program);

// What is wrong with `program`, whose instructions were `before` and are `now`, in words.
std::optional<std::string> moved_run(const SectionInstrs& before, const SectionInstrs& now,
                                     const StepProgram& program);

}  // namespace deepcompile
