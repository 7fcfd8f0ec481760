// SPDX-License-Identifier: Apache-2.0
// Chooses which regions to run again, by the memory they free at the fullest
// place and the time they take. Works on estimates of one block at a time; the
// caller builds the program, measures it, and asks for more.
#pragma once

#include <cstddef>
#include <vector>

#include "passes/memory_use.h"
#include "passes/recomputation_effect.h"

namespace deepcompile {

using ChosenRuns = std::vector<std::vector<bool>>;  // by graph, by run

class RecomputationChoice {
 public:
  // All outlive the choice; `estimator` may be null.
  RecomputationChoice(const StepProgram& program, const std::vector<RecomputableGraph>& graphs,
                      const MemoryTimeline& timeline, const StepClock& clock,
                      const Estimator* estimator);

  // Chooses more until the estimated peak is no more than `limit`, or nothing
  // helps; then returns false.
  bool reach(Bytes limit);

  const ChosenRuns& chosen() const { return chosen_; }

 private:
  // One block, and what more and more of it recomputed comes to.
  struct Block {
    size_t graph = 0, block = 0;
    std::vector<std::vector<bool>> levels;  // by level, by run of the block; 0 is nothing
    std::vector<RecomputationEffect> effects;
    size_t level = 0;
    size_t tried = 0;            // levels up to this one have been tried
    RecomputationEffect effect;  // as applied
  };

  void add_block(size_t graph, size_t block);
  void find_levels(Block* block);
  std::vector<bool> best_step(const Block& block, const std::vector<bool>& from, bool marked);
  // What the block would come to. Leaves chosen and plan as they were.
  RecomputationEffect effect_of(const Block& block, const std::vector<bool>& level);
  void set(const Block& block, const std::vector<bool>& level);
  bool marked(const Block& block, size_t level) const;
  Block* best_at(size_t place, size_t* level);
  bool take(Block* block, size_t level);
  void apply(Block* block, const RecomputationEffect& effect);
  void refresh_makers(const Block& block);

  const StepProgram& program_;
  const std::vector<RecomputableGraph>& graphs_;
  std::vector<EffectModel> models_;   // by graph
  std::vector<Recomputation> plans_;  // by graph, of what is chosen
  ChosenRuns chosen_;
  std::vector<Block> blocks_;
  std::vector<size_t> first_block_;  // by graph, in blocks_
  MemoryUse use_;
};

}  // namespace deepcompile
