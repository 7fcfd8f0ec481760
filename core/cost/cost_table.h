// SPDX-License-Identifier: Apache-2.0
// CostTable: what was measured on the machine a job runs on. Curves of bytes
// to nanoseconds, and a few numbers. Whatever was not measured is left to the
// machine description. The engine fills it at the start of a job and keeps it
// in the plan cache; MeasuredCosts reads it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/units.h"
#include "ir/program.h"

namespace deepcompile {

// Piecewise linear. Below the first point its time counts (a small transfer is
// all latency: start at 0 bytes for what is not); above the last the last
// slope goes on, for a single point the line through the origin.
class Curve {
 public:
  using Point = std::pair<Bytes, Nanos>;

  Curve() = default;
  // Sizes rise from point to point. Throws UserError, opened by `what`, if
  // they don't or a number is negative.
  Curve(std::vector<Point> points, const std::string& what);

  bool empty() const { return points_.empty(); }
  const std::vector<Point>& points() const { return points_; }
  Nanos at(Bytes bytes) const;  // not of an empty curve

  bool operator==(const Curve&) const = default;

 private:
  std::vector<Point> points_;
};

// What a curve is of, and what its bytes are.
enum class CurveKind : uint8_t {
  kGather,      // the whole parameter
  kReduce,      // the whole gradient in the element type it is reduced in
  kToHost,      // one tensor copied to the host
  kToDevice,    // one tensor copied back
  kUpdate,      // one rank's shard of the weights
  kAccumulate,  // one rank's shard of the reduction's result
  kNorm,        // all gradient shards of a rank
  kStaging,     // the whole gradient in the element type it is reduced in
};
inline constexpr int kCurveKindCount = 8;

std::string_view to_string(CurveKind kind);  // "gather", "to_host", ...
std::optional<CurveKind> parse_curve_kind(std::string_view word);

struct CostTable {
  int64_t world = 1;  // ranks it was measured with
  std::array<Curve, kCurveKindCount> curves;
  // Kernels beside a transfer between ranks take this many times as long.
  std::optional<double> compute_slowdown;
  // What each direction of the host link keeps of its speed while the other one is busy.
  std::optional<double> to_device_beside, to_host_beside;
  // Added to every run with a measured time: what a launch costs the host.
  std::optional<Nanos> run_overhead;
  // Before a section of this kind, with nothing to wait for: what the user's code takes.
  std::array<std::optional<Nanos>, kSectionKindCount> section_overhead;

  Curve& curve(CurveKind kind) { return curves[static_cast<size_t>(kind)]; }
  std::optional<Nanos>& overhead(SectionKind kind) {
    return section_overhead[static_cast<size_t>(kind)];
  }
  const Curve& curve(CurveKind kind) const { return curves[static_cast<size_t>(kind)]; }

  bool operator==(const CostTable&) const = default;
};

// JSON: {"world": 4, "gather": [[bytes, ns], ...], ..., "compute_slowdown": 1.1,
// "to_device_beside": 0.6, "to_host_beside": 0.9, "run_overhead_ns": 20000,
// "section_overhead_ns": {"forward": 90000}}; what was not measured is absent.
std::string serialize(const CostTable& table);
// `where` names the document in errors. Throws UserError for the first defect.
CostTable parse_cost_table(std::string_view json, const std::string& where = "cost table");

}  // namespace deepcompile
