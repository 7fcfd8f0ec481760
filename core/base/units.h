// SPDX-License-Identifier: Apache-2.0
// Strong types for the quantities that plans and simulations are made of.
//
// A Bytes never meets a Nanos by accident, and an id is never a pointer, so a
// program can be stored, hashed and compared between ranks.
#pragma once

#include <compare>
#include <cstdint>
#include <string>

namespace deepcompile {

// An amount of memory or traffic, in bytes.
struct Bytes {
  int64_t value = 0;

  constexpr auto operator<=>(const Bytes&) const = default;
  constexpr Bytes& operator+=(Bytes other) {
    value += other.value;
    return *this;
  }
  constexpr Bytes& operator-=(Bytes other) {
    value -= other.value;
    return *this;
  }
};
constexpr Bytes operator+(Bytes a, Bytes b) {
  return {a.value + b.value};
}
constexpr Bytes operator-(Bytes a, Bytes b) {
  return {a.value - b.value};
}
constexpr Bytes operator*(Bytes a, int64_t n) {
  return {a.value * n};
}

// A duration or a point on a simulated clock, in nanoseconds.
struct Nanos {
  int64_t value = 0;

  constexpr auto operator<=>(const Nanos&) const = default;
  constexpr Nanos& operator+=(Nanos other) {
    value += other.value;
    return *this;
  }
  constexpr Nanos& operator-=(Nanos other) {
    value -= other.value;
    return *this;
  }
};
constexpr Nanos operator+(Nanos a, Nanos b) {
  return {a.value + b.value};
}
constexpr Nanos operator-(Nanos a, Nanos b) {
  return {a.value - b.value};
}
constexpr Nanos operator*(Nanos a, int64_t n) {
  return {a.value * n};
}

// The most that one thing may be or take, and a program in all. What is read is checked, so that
// sums and products of these stay numbers.
inline constexpr int64_t kMostOfOne = int64_t{1} << 48;  // bytes or elements
inline constexpr int64_t kMostInAll = int64_t{1} << 52;
inline constexpr Nanos kLongestTime{86'400'000'000'000};  // a day
inline constexpr Nanos kLongestStep{int64_t{1} << 58};    // nine years

// Text forms, exact and shortest: "410MiB", "1536B", "3ms", "1500us", "7ns".
// The unit is the largest that divides the value, so parse(print(x)) == x.
std::string to_string(Bytes bytes);
std::string to_string(Nanos nanos);

// For people: three significant digits, e.g. "1.46 GiB", "3.20 ms".
std::string pretty(Bytes bytes);
std::string pretty(Nanos nanos);

// Parse the exact forms, and decimal fractions of a unit ("3.2ms") that come
// to a whole number. Throw UserError on anything else.
Bytes parse_bytes(const std::string& text);
Nanos parse_nanos(const std::string& text);

}  // namespace deepcompile
