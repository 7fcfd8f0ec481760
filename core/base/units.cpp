// SPDX-License-Identifier: Apache-2.0
#include "base/units.h"

#include <cstdio>
#include <span>
#include <string_view>

#include "base/error.h"

namespace deepcompile {
namespace {

struct Unit {
  std::string_view name;
  int64_t size;
};
constexpr Unit kByteUnits[] = {{"TiB", int64_t{1} << 40},
                               {"GiB", int64_t{1} << 30},
                               {"MiB", int64_t{1} << 20},
                               {"KiB", int64_t{1} << 10},
                               {"B", 1}};
constexpr Unit kTimeUnits[] = {{"s", 1'000'000'000}, {"ms", 1'000'000}, {"us", 1'000}, {"ns", 1}};

std::string exact(int64_t value, std::span<const Unit> units) {
  for (const Unit& unit : units) {
    if (value != 0 && value % unit.size == 0) {
      return std::to_string(value / unit.size) + std::string(unit.name);
    }
  }
  return "0" + std::string(units.back().name);
}

std::string pretty(int64_t value, std::span<const Unit> units) {
  const double magnitude = value < 0 ? -static_cast<double>(value) : static_cast<double>(value);
  for (const Unit& unit : units) {
    const double scaled = magnitude / static_cast<double>(unit.size);
    // 0.9995 of a unit would round to 1000 of the next smaller one.
    if (scaled < 0.9995 && unit.size != 1) continue;
    const int decimals = unit.size == 1 ? 0 : scaled < 9.995 ? 2 : scaled < 99.95 ? 1 : 0;
    char text[64];
    std::snprintf(text, sizeof text, "%s%.*f ", value < 0 ? "-" : "", decimals, scaled);
    return text + std::string(unit.name);
  }
  return {};
}

// One amount of `what` ("a size", "a time"), as number and unit.
int64_t parse(const std::string& text, std::span<const Unit> units, const char* what,
              const char* example) {
  const auto fail = [&](const std::string& cause) {
    throw UserError("[base] " + std::string(what) + " '" + text + "': " + cause +
                    ". Write it as in " + example + ".");
  };
  size_t at = 0;
  int64_t mantissa = 0;
  int64_t divisor = 1;
  bool digits = false;
  bool fraction = false;
  for (; at < text.size(); ++at) {
    const char c = text[at];
    if (c == '.' && !fraction && digits) {
      fraction = true;
      continue;
    }
    if (c < '0' || c > '9') break;
    digits = true;
    if (__builtin_mul_overflow(mantissa, int64_t{10}, &mantissa) ||
        __builtin_add_overflow(mantissa, int64_t{c - '0'}, &mantissa) ||
        (fraction && __builtin_mul_overflow(divisor, int64_t{10}, &divisor))) {
      fail("too many digits");
    }
  }
  if (!digits) fail("does not begin with a number");
  const std::string_view suffix = std::string_view(text).substr(at);
  for (const Unit& unit : units) {
    if (unit.name != suffix) continue;
    while (divisor > 1 && mantissa % 10 == 0) {
      mantissa /= 10;
      divisor /= 10;
    }
    int64_t scaled = 0;
    if (__builtin_mul_overflow(mantissa, unit.size, &scaled)) fail("is too large");
    if (scaled % divisor != 0) fail("is not a whole number of " + std::string(units.back().name));
    return scaled / divisor;
  }
  std::string known;
  for (size_t i = units.size(); i-- > 0;) {
    known += std::string(units[i].name) + (i == 0 ? "" : ", ");
  }
  if (suffix.empty()) fail("has no unit (" + known + ")");
  fail("unit '" + std::string(suffix) + "' is none of " + known);
  return 0;
}

}  // namespace

std::string to_string(Bytes bytes) {
  return exact(bytes.value, kByteUnits);
}
std::string to_string(Nanos nanos) {
  return exact(nanos.value, kTimeUnits);
}
std::string pretty(Bytes bytes) {
  return pretty(bytes.value, kByteUnits);
}
std::string pretty(Nanos nanos) {
  return pretty(nanos.value, kTimeUnits);
}

Bytes parse_bytes(const std::string& text) {
  return {parse(text, kByteUnits, "size", "512B, 64KiB or 1.5GiB")};
}
Nanos parse_nanos(const std::string& text) {
  return {parse(text, kTimeUnits, "time", "7ns, 1500us or 3.2ms")};
}

}  // namespace deepcompile
