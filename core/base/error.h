// SPDX-License-Identifier: Apache-2.0
// Errors. A UserError names stage, object, cause and remedy, in that order:
//   [passes] prefetch: needs gathers_placed, which no earlier pass provides.
//   Put zero3_compile before it.
// DC_CHECK guards invariants: its failure is a bug of ours, never the user's.
#pragma once

#include <stdexcept>
#include <string>

namespace deepcompile {

class UserError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class InternalError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

[[noreturn]] void check_failed(const char* condition, const char* file, int line,
                               const std::string& message);

}  // namespace deepcompile

#define DC_CHECK(condition, message)                                                          \
  do {                                                                                        \
    if (!(condition)) ::deepcompile::check_failed(#condition, __FILE__, __LINE__, (message)); \
  } while (false)
