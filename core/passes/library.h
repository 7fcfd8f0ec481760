// SPDX-License-Identifier: Apache-2.0
// Passes from a user's shared library (see library_abi.h for what crosses).
//
// Callers: the bindings. A loaded library stays loaded until the process ends:
// its passes may be in any schedule.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "passes/pass.h"

namespace deepcompile {

// The passes of the library at `path`. Throws UserError, which names the
// library, if it cannot be loaded, is no pass library, or speaks another ABI.
// What such a pass throws is a UserError that names pass and library.
std::vector<std::unique_ptr<Pass>> load_pass_library(const std::string& path);

}  // namespace deepcompile
