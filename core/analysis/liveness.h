// SPDX-License-Identifier: Apache-2.0
// Where values die.
//
// A value lives in the environment of its graph: from the section that makes
// or receives it to its last use in that graph, also when that is in the
// backward. Section outputs are handed to the caller and never freed by an
// instruction. A value that a region makes a second time (recomputation) is
// dead between its last use before and the second making.
#pragma once

#include <vector>

#include "ir/program.h"

namespace deepcompile {

struct SectionLiveness {
  // frees[i]: values that nothing needs once instruction i is done. An input
  // that nothing reads dies after the first instruction.
  std::vector<std::vector<ValueId>> frees;
  // Alive at the section's end for the graph's later section: saved activations.
  std::vector<ValueId> saved;
};

struct Liveness {
  std::vector<SectionLiveness> sections;  // as in the program
};

// `program` has passed verify_structure. Lists are sorted by id.
Liveness analyze_liveness(const StepProgram& program);

}  // namespace deepcompile
