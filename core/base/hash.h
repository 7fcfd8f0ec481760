// SPDX-License-Identifier: Apache-2.0
// FNV-1a, 64 bits: names what ranks compare. Not against an adversary.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace deepcompile {

class Hash {
 public:
  void add(std::string_view bytes) {
    for (const char c : bytes) hash_ = (hash_ ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
  std::string digits() const;  // 16 hexadecimal digits

 private:
  uint64_t hash_ = 0xcbf29ce484222325u;
};

}  // namespace deepcompile
