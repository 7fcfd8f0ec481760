// SPDX-License-Identifier: Apache-2.0
// Passes by name. An engine has its own registry, so that a pass one user adds
// is not seen by another.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "passes/pass.h"

namespace deepcompile {

using PassFunction = std::function<void(StepProgram&, PassContext&)>;

// A pass made of a function, for passes written by users (in Python, say).
std::unique_ptr<Pass> make_pass(std::string name, Contract contract, PassFunction function,
                                std::string summary = "user-defined");

class PassRegistry {
 public:
  static PassRegistry with_builtins();

  // Throws UserError if the name is taken or is not a name.
  const Pass& add(std::unique_ptr<Pass> pass);

  const Pass* find(std::string_view name) const;  // null if there is none
  const Pass& get(std::string_view name) const;   // throws UserError, which lists the names
  std::vector<std::string> names() const;         // in the order in which they were added

 private:
  std::vector<std::unique_ptr<Pass>> passes_;
};

}  // namespace deepcompile
