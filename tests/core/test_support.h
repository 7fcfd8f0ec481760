// SPDX-License-Identifier: Apache-2.0
// Shared by the core's tests.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>

#include "base/error.h"
#include "ir/program.h"

namespace deepcompile {

// How failed expectations show quantities.
inline void PrintTo(Bytes bytes, std::ostream* out) {
  *out << bytes.value << " B";
}
inline void PrintTo(Nanos nanos, std::ostream* out) {
  *out << nanos.value << " ns";
}

// The message of the UserError that `action` throws; "no error" if none.
template <typename Action>
std::string error_of(Action action) {
  try {
    action();
  } catch (const UserError& error) {
    return error.what();
  }
  return "no error";
}

// Under sanitizers, which say nothing of speed.
#ifdef __SANITIZE_ADDRESS__
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

// How many random programs to try where there are `all`. Under sanitizers a sixth: what they
// look for, each program's search does again and again, at a tenth of the speed.
constexpr uint32_t seeds(uint32_t all) {
  return kSanitized ? all / 6 : all;
}

// The instructions of the program's sections alone, as text.
std::string sections_text(const StepProgram& program);

// Every occurrence of `from` in `text` replaced; fails the test if there is none.
std::string replaced(std::string text, const std::string& from, const std::string& to);

// Two sharded layers (a, b) of 128 f32 elements, a pack of two norms, one rank
// pair; forward of two regions, backward of two, compute only.
extern const char kTwoLayers[];

// kTwoLayers after zero3_compile.
StepProgram two_layers_zero3();

}  // namespace deepcompile
