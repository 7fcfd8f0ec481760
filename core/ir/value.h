// SPDX-License-Identifier: Apache-2.0
// What flows between the regions of a step program, and what regions read.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "base/ids.h"
#include "base/units.h"

namespace deepcompile {

// One member tensor of a parameter. Written "small[3]", or "embed" for member 0.
struct ParamRef {
  ParamId param{};
  uint32_t member = 0;

  bool operator==(const ParamRef&) const = default;
};

// Which rows of a parameter a graph reads: those that a value numbers.
struct RowsOf {
  ParamId param{};
  int64_t row = 0;  // elements of one row

  bool operator==(const RowsOf&) const = default;
};
inline constexpr int64_t kRowNumberBytes = 8;  // row numbers are 64-bit integers

// A tensor made by a region or handed in by the user's call.
struct Value {
  std::string name;
  Bytes bytes;
  std::optional<ParamRef> grad_of;  // set if it is the gradient of a member
  // Set if it is a forward's input that numbers the rows which its graph reads of
  // an embedding: that graph gathers and reduces these rows, not the whole.
  std::optional<RowsOf> rows_of = std::nullopt;
};

using Operand = std::variant<ValueId, ParamRef>;

}  // namespace deepcompile
