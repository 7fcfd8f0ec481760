// SPDX-License-Identifier: Apache-2.0
// Divides a row of regions into the blocks that are recomputed as one.
#pragma once

#include <cstddef>
#include <vector>

#include "ir/program.h"

namespace deepcompile {

// The block of each region, rising from 0 by at most 1. Layers are found by
// their code: the longest stretch that repeats a sequence of codes gives one
// block a repetition, cut where the fewest bytes cross. Elsewhere regions that
// the user marked (Region.checkpoint) and that stand together are one block,
// up to a number of them, and every other region is one by itself.
std::vector<size_t> divide_into_blocks(const StepProgram& program,
                                       const std::vector<RegionId>& runs);

}  // namespace deepcompile
