// SPDX-License-Identifier: Apache-2.0
// What of a forward can be run again in its backward, and the program in which
// it is. Which regions are, and why, is rematerialize.cpp's.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "ir/program.h"

namespace deepcompile {

inline constexpr size_t kNever = static_cast<size_t>(-1);

// A value of one graph. Runs are positions in RecomputableGraph::runs,
// instructions positions in the backward.
struct ValueUse {
  size_t maker = kNever;           // the forward's run that makes it
  std::vector<size_t> users;       // the forward's runs that read it, in order
  size_t first_backward = kNever;  // the backward's first instruction that reads it
  size_t last_backward = kNever;
  bool output = false;  // of a section: its memory is the caller's
};

// A forward with a backward. Its runs are divided into blocks, one after the
// other: equal layers are a block each, other regions alone. What one block
// hands to another is kept, so that each block runs again from what it was
// given; inside of a block everything can be made again.
struct RecomputableGraph {
  size_t forward = 0, backward = 0;  // sections
  std::vector<RegionId> runs;        // in the forward's order
  std::vector<size_t> instrs;        // by run: its position in the forward
  std::vector<size_t> block;         // by run; rises from 0 by at most 1
  std::vector<size_t> first_run;     // by block, and one past the last
  std::vector<bool> allowed;         // by run: may run again
  std::vector<ValueUse> values;      // by ValueId; those of other graphs are empty

  size_t blocks() const { return first_run.size() - 1; }
};

// `program` has passed verify.
std::vector<RecomputableGraph> recomputable_graphs(const StepProgram& program);

// Of the runs that are chosen, those that have to run again: something of
// theirs is read in the backward, or by another of the same block that does.
struct Recomputation {
  std::vector<bool> again;    // by run
  std::vector<size_t> place;  // by run: the backward's instruction just before which it runs
  std::vector<size_t> until;  // by block: the last instruction that reads what was made again
};
Recomputation plan_recomputation(const StepProgram& program, const RecomputableGraph& graph,
                                 const std::vector<bool>& chosen);
// Of all graphs, where these regions are chosen as far as they may run again.
std::vector<Recomputation> plan_recomputations(const StepProgram& program,
                                               const std::vector<RecomputableGraph>& graphs,
                                               const std::vector<RegionId>& regions);
// The same for one block, in a plan of which the later blocks are right.
void plan_block(const StepProgram& program, const RecomputableGraph& graph, size_t block,
                const std::vector<bool>& chosen, Recomputation* plan);

// Whether `id` stays from the forward for another block's sake, or its caller's.
bool is_pinned(const RecomputableGraph& graph, const std::vector<bool>& again, ValueId id);

// The program with those runs in its backward, each chain just before the
// first instruction that needs it, its parameters gathered, waited for and
// released around it. With `share`, a parameter that the backward gathers
// anyway while the block is in use is gathered once, for both.
void place_recomputation(const RecomputableGraph& graph, const Recomputation& plan, bool share,
                         StepProgram* program);

}  // namespace deepcompile
