// SPDX-License-Identifier: Apache-2.0
// For passes in a shared library of your own:
//
//   class MyPass final : public deepcompile::Pass { ... };
//   DEEPCOMPILE_PASS(MyPass);
//
// The macro stands at namespace scope of one source; a library may have many.
// Link the static target deepcompile::core and hide symbols (the CMake function
// deepcompile_add_passes does both). The pass gets the program, and in
// context.environment() what the host knows: memory_budget, early_updates,
// an estimator of instructions, and `simulate`, which runs in the library.
#pragma once

#include <memory>

#include "sim/exported_passes.h"

// Here and not in the core, whose symbols the library keeps to itself.
extern "C" __attribute__((weak, visibility("default"))) const DeepcompilePassLibrary*
deepcompile_pass_library(void) {
  return ::deepcompile::exported_passes();
}

#define DEEPCOMPILE_PASS(Type)                         \
  [[maybe_unused]] static const bool kExported##Type = \
      ::deepcompile::export_pass(std::make_unique<Type>())
