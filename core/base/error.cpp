// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"

namespace deepcompile {

void check_failed(const char* condition, const char* file, int line, const std::string& message) {
  throw InternalError(std::string("[internal] ") + file + ":" + std::to_string(line) + ": " +
                      message + " (" + condition +
                      " does not hold). This is a bug in deepcompile: please report it with "
                      "the program text.");
}

}  // namespace deepcompile
