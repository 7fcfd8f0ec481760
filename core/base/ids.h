// SPDX-License-Identifier: Apache-2.0
// Ids of the objects of a step program: indices into its tables.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deepcompile {

enum class ParamId : uint32_t {};
enum class ValueId : uint32_t {};
enum class RegionId : uint32_t {};
enum class SectionId : uint32_t {};

template <typename Id>
constexpr size_t index(Id id) {
  return static_cast<size_t>(id);
}

}  // namespace deepcompile
