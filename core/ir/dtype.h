// SPDX-License-Identifier: Apache-2.0
// Element types a parameter can have.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace deepcompile {

enum class DType : uint8_t { kF32, kF16, kBF16, kF64 };

// Bytes per element.
constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2;
}
std::string_view to_string(DType dtype);  // "f32", "f16", "bf16", "f64"
bool parse_dtype(std::string_view text, DType* out);

}  // namespace deepcompile
