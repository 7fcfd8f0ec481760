// SPDX-License-Identifier: Apache-2.0
// What makes a step program valid. Run after parsing, after every pass and
// before freezing; linear in the size of the program.
//
// Structure (any program): ids in range; operands as the instruction's traits
// say; at most one section of a kind and graph, a backward after its forward,
// the update last; every region run, in one graph only; every value made
// before it is used, and by one region only; gradients made in backwards; no region run again
// behind one that may have written to an input of it.
//
// Plan (a program that passes have completed): structure, and
//   - each use of a sharded parameter follows a wait, which follows a gather,
//     in its own section and since the last release. So a section is right
//     whatever ran before it; a gather of what is whole already costs nothing;
//   - each gradient is reduced once in the backward that makes it, by the one
//     reduce that names its parameter, those of one member in the order in which they are made,
//     and each reduction is accumulated after; nothing is reduced after its update in a backward;
//   - with an update section: every trainable parameter is updated or deferred
//     in it once, after the norm if the step clips, and gathered again if it is
//     kept whole; a deferred one is gathered in every section that uses it;
//   - an update in a forward stands before the uses of its parameter, one in a
//     backward after its accumulation and after the step's last use;
//   - what is copied to the host or back is used, updated or moved again only
//     when that is over, and every copy that starts is waited for.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ir/program.h"

namespace deepcompile {

// All throw UserError: "[ir] <program>: <section> <n> (<instruction>): ...".
void verify_structure(const StepProgram& program);
void verify_plan(const StepProgram& program);
void verify_residency(const StepProgram& program);  // a part of verify_plan
void verify_rows(const StepProgram& program);       // a part of verify_structure
// verify_plan unless it is compute only, else verify_structure.
void verify(const StepProgram& program);

// Whether no instruction other than `run` is there.
bool compute_only(const StepProgram& program);

// The collectives of a step, in order: "backward 0: reduce L0.q". Two programs
// may run on two ranks together only if these are equal; names of values and
// regions, and sizes that differ from rank to rank, have no part in it.
std::vector<std::string> collective_order(const StepProgram& program);

// What differs first between two orders, in words; nothing if they are equal.
std::optional<std::string> order_difference(const std::vector<std::string>& a,
                                            const std::vector<std::string>& b);

}  // namespace deepcompile
