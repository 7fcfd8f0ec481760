// SPDX-License-Identifier: Apache-2.0
#include "ir/dtype.h"

#include <algorithm>
#include <iterator>

#include "base/error.h"

namespace deepcompile {
namespace {

constexpr std::string_view kNames[] = {"f32", "f16", "bf16", "f64"};  // in DType's order

}  // namespace

std::string_view to_string(DType dtype) {
  const auto at = static_cast<size_t>(dtype);
  DC_CHECK(at < std::size(kNames), "unknown dtype");
  return kNames[at];
}

bool parse_dtype(std::string_view text, DType* out) {
  const auto found = std::find(std::begin(kNames), std::end(kNames), text);
  if (found == std::end(kNames)) return false;
  *out = static_cast<DType>(found - std::begin(kNames));
  return true;
}

}  // namespace deepcompile
