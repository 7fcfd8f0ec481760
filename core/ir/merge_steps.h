// SPDX-License-Identifier: Apache-2.0
// One step program out of the programs of its captured graphs and its update.
#pragma once

#include <string>
#include <vector>

#include "ir/program.h"

namespace deepcompile {

// `graphs` hold forward and backward, or inference, sections; `update` one
// update section; all agree on world, accumulation, clip and reduce dtype, and
// on every parameter of the same name. Graph k becomes number k. With several
// graphs, names of values and regions get the prefix "g<k>.".
//
// Sections: forwards and inferences in the order of the graphs, backwards in
// the reverse order (autograd runs the last graph's first), then the update.
// Parameters: in order of first appearance. Throws UserError on disagreement.
StepProgram merge_steps(std::string name, const std::vector<StepProgram>& graphs,
                        const StepProgram& update);

}  // namespace deepcompile
