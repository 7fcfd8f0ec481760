// SPDX-License-Identifier: Apache-2.0
// Where values die.
//
// A value lives in the environment of its graph: from the section that makes
// or receives it to its last use in that graph, also when that is in the
// backward. Section outputs are handed to the caller and never freed by an
// instruction. A value that a region makes a second time (recomputation) is
// dead between its last use before and the second making.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ir/program.h"

namespace deepcompile {

// A list of values for each instruction of a section, all in one buffer: a
// planner makes these by the hundred. Written from the last instruction to the
// first, as the analysis walks.
class FreeLists {
 public:
  explicit FreeLists(size_t instrs = 0) : ends_(instrs, 0) {}

  size_t size() const { return ends_.size(); }
  std::span<const ValueId> operator[](size_t instr) const {
    const size_t begin = instr + 1 < ends_.size() ? ends_[instr + 1] : 0;
    return {ids_.data() + begin, ends_[instr] - begin};
  }

  // To the list of the instruction that is finished next.
  void add(ValueId id) { ids_.push_back(id); }
  // Sorts the list of this instruction, each value once. The first's may be
  // finished again, with more added.
  void finish(size_t instr) {
    const size_t begin = instr + 1 < ends_.size() ? ends_[instr + 1] : 0;
    if (ids_.size() - begin > 1) sort_from(begin);
    ends_[instr] = static_cast<uint32_t>(ids_.size());
  }

 private:
  void sort_from(size_t begin);

  std::vector<ValueId> ids_;
  std::vector<uint32_t> ends_;  // by instruction: where its list ends in ids_
};

struct SectionLiveness {
  // frees[i]: values that nothing needs once instruction i is done. An input
  // that nothing reads dies after the first instruction.
  FreeLists frees;
  // Alive at the section's end for the graph's later section: saved activations.
  std::vector<ValueId> saved;
};

struct Liveness {
  std::vector<SectionLiveness> sections;  // as in the program
};

// `program` has passed verify_structure. Lists are sorted by id.
Liveness analyze_liveness(const StepProgram& program);

}  // namespace deepcompile
