// SPDX-License-Identifier: Apache-2.0
#include "passes/recomputation_choice.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

namespace deepcompile {
namespace {

constexpr size_t kMostLevels = 8;

double time_per_byte(Nanos time, Bytes bytes) {
  return static_cast<double>(time.value) / static_cast<double>(bytes.value);
}

}  // namespace

RecomputationChoice::RecomputationChoice(const StepProgram& program,
                                         const std::vector<RecomputableGraph>& graphs,
                                         const MemoryTimeline& timeline, const StepClock& clock,
                                         const Estimator* estimator)
    : program_(program), graphs_(graphs), use_(bytes_by_place(timeline)) {
  for (size_t g = 0; g < graphs.size(); ++g) {
    models_.emplace_back(program, graphs[g], clock, estimator);
    chosen_.emplace_back(graphs[g].runs.size(), false);
    plans_.push_back(plan_recomputation(program, graphs[g], chosen_[g]));
    first_block_.push_back(blocks_.size());
    for (size_t b = 0; b < graphs[g].blocks(); ++b) add_block(g, b);
  }
}

void RecomputationChoice::add_block(size_t graph, size_t block) {
  blocks_.push_back({graph, block, {}, {}, 0, 0, {}});
  find_levels(&blocks_.back());
}

void RecomputationChoice::set(const Block& block, const std::vector<bool>& level) {
  const RecomputableGraph& graph = graphs_[block.graph];
  const size_t first = graph.first_run[block.block];
  for (size_t i = 0; i < level.size(); ++i) chosen_[block.graph][first + i] = level[i];
  plan_block(program_, graph, block.block, chosen_[block.graph], &plans_[block.graph]);
}

RecomputationEffect RecomputationChoice::effect_of(const Block& block,
                                                   const std::vector<bool>& level) {
  const RecomputableGraph& graph = graphs_[block.graph];
  const auto& chosen = chosen_[block.graph];
  const auto at = [&](size_t run) { return chosen.begin() + static_cast<std::ptrdiff_t>(run); };
  const std::vector<bool> before(at(graph.first_run[block.block]),
                                 at(graph.first_run[block.block + 1]));
  set(block, level);
  RecomputationEffect out = models_[block.graph].effect(block.block, plans_[block.graph]);
  set(block, before);
  return out;
}

// From nothing to everything, each step the one that frees the most bytes
// between forward and backward for its time; what the user marked first. Equal layers have equal
// levels, so they are looked for once.
void RecomputationChoice::find_levels(Block* block) {
  const RecomputableGraph& graph = graphs_[block->graph];
  const size_t first = graph.first_run[block->block];
  const size_t size = graph.first_run[block->block + 1] - first;
  const auto same = [&](const Block& other) {
    const RecomputableGraph& its = graphs_[other.graph];
    const size_t at = its.first_run[other.block];
    if (its.first_run[other.block + 1] - at != size) return false;
    for (size_t i = 0; i < size; ++i) {
      const Region& mine = program_.region(graph.runs[first + i]);
      const Region& others = program_.region(its.runs[at + i]);
      const bool equal = mine.code == others.code && mine.checkpoint == others.checkpoint &&
                         graph.allowed[first + i] == its.allowed[at + i];
      if (!equal) return false;
    }
    return true;
  };
  block->levels.emplace_back(size, false);
  const Block* like = blocks_.size() > 1 ? &blocks_[blocks_.size() - 2] : nullptr;
  if (size > 1 && like != nullptr && same(*like)) {
    block->levels = like->levels;
  } else {
    for (bool marked : {true, false}) {
      while (block->levels.size() < kMostLevels) {
        std::vector<bool> next = best_step(*block, block->levels.back(), marked);
        if (next.empty()) break;
        block->levels.push_back(std::move(next));
      }
    }
  }
  for (const auto& level : block->levels) block->effects.push_back(effect_of(*block, level));
}

// `from` with one more stretch of regions, of marked ones alone if `marked`;
// empty if none frees anything.
std::vector<bool> RecomputationChoice::best_step(const Block& block, const std::vector<bool>& from,
                                                 bool marked) {
  const RecomputableGraph& graph = graphs_[block.graph];
  const size_t first = graph.first_run[block.block];
  const size_t middle = models_[block.graph].middle();
  const RecomputationEffect before = effect_of(block, from);
  double best = std::numeric_limits<double>::infinity();
  std::vector<bool> out;
  for (size_t length = 1; length <= from.size();
       length = length < from.size() ? std::min(2 * length, from.size()) : length + 1) {
    for (size_t at = 0; at + length <= from.size(); ++at) {
      std::vector<bool> level = from;
      for (size_t i = at; i < at + length; ++i) {
        const bool hinted = program_.region(graph.runs[first + i]).checkpoint;
        if (graph.allowed[first + i] && (hinted || !marked)) level[i] = true;
      }
      if (level == from) continue;
      const RecomputationEffect after = effect_of(block, level);
      const Bytes freed = before.at(middle) - after.at(middle);
      if (freed <= Bytes{0}) continue;
      const double price = time_per_byte(after.time - before.time, freed);
      if (price < best) {
        best = price;
        out = std::move(level);
      }
    }
  }
  return out;
}

bool RecomputationChoice::marked(const Block& block, size_t level) const {
  const RecomputableGraph& graph = graphs_[block.graph];
  const size_t first = graph.first_run[block.block];
  for (size_t i = 0; i < block.levels[level].size(); ++i) {
    const bool more = block.levels[level][i] && !block.levels[block.level][i];
    if (more && !program_.region(graph.runs[first + i]).checkpoint) return false;
  }
  return true;
}

// The block and level that free bytes at the place for the least time; the
// user's marks first, then the earlier block: its memory waits for longer.
RecomputationChoice::Block* RecomputationChoice::best_at(size_t place, size_t* level) {
  Block* best = nullptr;
  std::pair<bool, double> best_key;
  for (Block& block : blocks_) {
    const Bytes now = block.effect.at(place);
    for (size_t next = std::max(block.tried, block.level) + 1; next < block.levels.size(); ++next) {
      const Bytes freed = now - block.effects[next].at(place);
      if (freed <= Bytes{0}) continue;
      const Nanos time = block.effects[next].time - block.effect.time;
      const std::pair key(!marked(block, next), time_per_byte(time, freed));
      if (best != nullptr && best_key <= key) continue;
      best = &block;
      best_key = key;
      *level = next;
    }
  }
  return best;
}

void RecomputationChoice::apply(Block* block, const RecomputationEffect& effect) {
  for (const auto& range : block->effect.ranges) {
    use_.add(range.first, range.last, Bytes{0} - range.bytes);
  }
  block->effect = effect;
  for (const auto& range : effect.ranges) use_.add(range.first, range.last, range.bytes);
}

// What the block is given is pinned or not by what it recomputes: blocks that
// make it, and have been chosen, free more or less than before.
void RecomputationChoice::refresh_makers(const Block& block) {
  const RecomputableGraph& graph = graphs_[block.graph];
  std::vector<size_t> makers;
  for (size_t run = graph.first_run[block.block]; run < graph.first_run[block.block + 1]; ++run) {
    for (const Operand& operand : program_.region(graph.runs[run]).inputs) {
      const auto* id = std::get_if<ValueId>(&operand);
      if (id == nullptr || graph.values[index(*id)].maker == kNever) continue;
      const size_t maker = graph.block[graph.values[index(*id)].maker];
      if (maker != block.block) makers.push_back(maker);
    }
  }
  std::sort(makers.rbegin(), makers.rend());
  makers.erase(std::unique(makers.begin(), makers.end()), makers.end());
  for (size_t maker : makers) {
    Block& other = blocks_[first_block_[block.graph] + maker];
    if (other.level == 0) continue;
    const std::vector<bool> level = other.levels[other.level];
    set(other, level);
    apply(&other, models_[other.graph].effect(other.block, plans_[other.graph]));
  }
}

// Undone if the step's peak would rise.
bool RecomputationChoice::take(Block* block, size_t level) {
  const Bytes before = use_.max();
  const size_t old = block->level;
  const auto go_to = [&](size_t to) {
    block->level = to;
    set(*block, block->levels[to]);
    apply(block, models_[block->graph].effect(block->block, plans_[block->graph]));
    refresh_makers(*block);
  };
  go_to(level);
  block->tried = level;
  if (use_.max() <= before) return true;
  go_to(old);
  return false;
}

bool RecomputationChoice::reach(Bytes limit) {
  while (use_.max() > limit) {
    size_t level = 0;
    Block* best = best_at(use_.fullest(), &level);
    if (best == nullptr) return false;
    take(best, level);
  }
  return true;
}

}  // namespace deepcompile
