// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

#include "passes/pass.h"

namespace deepcompile::bindings {

// A pass of a user's shared library, as Python holds it.
struct LoadedPass {
  std::shared_ptr<const Pass> pass;
  std::string library;
};

}  // namespace deepcompile::bindings
