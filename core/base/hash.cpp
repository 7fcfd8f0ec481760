// SPDX-License-Identifier: Apache-2.0
#include "base/hash.h"

#include <cinttypes>
#include <cstdio>

namespace deepcompile {

std::string Hash::digits() const {
  char out[17];
  std::snprintf(out, sizeof(out), "%016" PRIx64, hash_);
  return out;
}

}  // namespace deepcompile
