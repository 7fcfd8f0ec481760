// SPDX-License-Identifier: Apache-2.0
// The passes that a shared library exports, in the library (see export_pass.h).
#pragma once

#include <memory>

#include "passes/library_abi.h"
#include "passes/pass.h"

namespace deepcompile {

// Adds a pass to this library's table. Returns true.
bool export_pass(std::unique_ptr<Pass> pass);

const DeepcompilePassLibrary* exported_passes();

}  // namespace deepcompile
