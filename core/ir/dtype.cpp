// SPDX-License-Identifier: Apache-2.0
#include "ir/dtype.h"

#include "base/error.h"

namespace deepcompile {
namespace {

struct DTypeTraits {
  DType dtype;
  std::string_view name;
  int64_t size;  // bytes
};
constexpr DTypeTraits kDTypes[] = {{DType::kF32, "f32", 4},
                                   {DType::kF16, "f16", 2},
                                   {DType::kBF16, "bf16", 2},
                                   {DType::kF64, "f64", 8}};

const DTypeTraits& traits_of(DType dtype) {
  const auto at = static_cast<size_t>(dtype);
  DC_CHECK(at < std::size(kDTypes) && kDTypes[at].dtype == dtype, "unknown dtype");
  return kDTypes[at];
}

}  // namespace

int64_t element_size(DType dtype) {
  return traits_of(dtype).size;
}
std::string_view to_string(DType dtype) {
  return traits_of(dtype).name;
}

bool parse_dtype(std::string_view text, DType* out) {
  for (const DTypeTraits& each : kDTypes) {
    if (each.name == text) {
      *out = each.dtype;
      return true;
    }
  }
  return false;
}

}  // namespace deepcompile
