// SPDX-License-Identifier: Apache-2.0
#include "cost/cost_table.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/json_reader.h"
#include "cost/host_beside.h"
#include "cost/machine.h"

namespace deepcompile {
namespace {

constexpr std::string_view kNames[kCurveKindCount] = {
    "gather", "reduce", "to_host", "to_device", "update", "accumulate", "norm", "staging"};
constexpr double kMostSlowdown = 100;  // as in machine descriptions

Curve read_curve(const JsonReader& reader, const std::string& what) {
  std::vector<Curve::Point> points;
  for (const JsonReader& point : reader.elements()) {
    const std::vector<JsonReader> numbers = point.elements();
    if (numbers.size() != 2) point.fail("must be [bytes, nanoseconds].");
    points.emplace_back(Bytes{numbers[0].integer(0, kMostInAll)},
                        Nanos{numbers[1].integer(0, kLongestTime.value)});
  }
  return Curve(std::move(points), what);
}

std::optional<double> read_beside(const JsonReader& root, const std::string& key) {
  const auto beside = root.find(key);
  if (!beside) return std::nullopt;
  const double kept = beside->number();
  if (!is_fraction(kept)) {
    beside->fail("must be from 0.01 to 1 (directions do not disturb each other).");
  }
  return kept;
}

Nanos along(const Curve::Point& from, const Curve::Point& to, Bytes bytes) {
  const double size = static_cast<double>((to.first - from.first).value);
  const double share = static_cast<double>((bytes - from.first).value) / size;
  const double rise = static_cast<double>((to.second - from.second).value);
  const double most = static_cast<double>(kLongestTime.value);
  return from.second + Nanos{std::llround(std::clamp(rise * share, -most, most))};
}

}  // namespace

Curve::Curve(std::vector<Point> points, const std::string& what) : points_(std::move(points)) {
  for (size_t i = 0; i < points_.size(); ++i) {
    const auto [bytes, time] = points_[i];
    if (bytes < Bytes{0} || time < Nanos{0}) {
      throw UserError(what + ": point " + std::to_string(i) +
                      " has a negative number. Sizes and times are 0 or more.");
    }
    if (bytes.value > kMostInAll || time > kLongestTime) {
      throw UserError(what + ": point " + std::to_string(i) +
                      " is of more than 4 PiB, or takes more than a day. Correct it.");
    }
    if (i > 0 && bytes <= points_[i - 1].first) {
      throw UserError(what + ": point " + std::to_string(i) + " is of " +
                      std::to_string(bytes.value) + " bytes, the one before it of " +
                      std::to_string(points_[i - 1].first.value) +
                      ". Give each size once, in rising order.");
    }
  }
}

Nanos Curve::at(Bytes bytes) const {
  DC_CHECK(!empty(), "a curve without points");
  if (bytes <= points_.front().first) return points_.front().second;
  const auto above =
      std::lower_bound(points_.begin(), points_.end(), bytes,
                       [](const Point& point, Bytes wanted) { return point.first < wanted; });
  if (above != points_.end()) return along(*(above - 1), *above, bytes);
  const Point from = points_.size() > 1 ? points_[points_.size() - 2] : Point{};
  if (from.first == points_.back().first) return points_.back().second;  // one, of 0 bytes
  return std::max(points_.back().second, along(from, points_.back(), bytes));
}

std::string_view to_string(CurveKind kind) {
  return kNames[static_cast<size_t>(kind)];
}

std::optional<CurveKind> parse_curve_kind(std::string_view word) {
  const auto found = std::find(std::begin(kNames), std::end(kNames), word);
  if (found == std::end(kNames)) return std::nullopt;
  return static_cast<CurveKind>(found - std::begin(kNames));
}

std::string serialize(const CostTable& table) {
  nlohmann::ordered_json json = {{"world", table.world}};
  for (int i = 0; i < kCurveKindCount; ++i) {
    const auto kind = static_cast<CurveKind>(i);
    if (table.curve(kind).empty()) continue;
    auto& points = json[std::string(to_string(kind))] = nlohmann::ordered_json::array();
    for (const auto& [bytes, time] : table.curve(kind).points()) {
      points.push_back({bytes.value, time.value});
    }
  }
  if (table.compute_slowdown) json["compute_slowdown"] = *table.compute_slowdown;
  if (table.to_device_beside) json["to_device_beside"] = *table.to_device_beside;
  if (table.to_host_beside) json["to_host_beside"] = *table.to_host_beside;
  if (table.run_overhead) json["run_overhead_ns"] = table.run_overhead->value;
  for (int i = 0; i < kSectionKindCount; ++i) {
    const auto& overhead = table.section_overhead[static_cast<size_t>(i)];
    if (!overhead) continue;
    const std::string kind(to_string(static_cast<SectionKind>(i)));
    json["section_overhead_ns"][kind] = overhead->value;
  }
  return json.dump();
}

CostTable parse_cost_table(std::string_view json, const std::string& where) {
  const std::string stage = "[cost] " + where;
  const nlohmann::json document = parse_json(json, stage);
  const JsonReader root(document, stage);
  root.only({"world", "gather", "reduce", "to_host", "to_device", "update", "accumulate", "norm",
             "staging", "compute_slowdown", "to_device_beside", "to_host_beside", "run_overhead_ns",
             "section_overhead_ns"});
  CostTable table;
  table.world = root.at("world").integer(1, kMostRanks);
  for (int i = 0; i < kCurveKindCount; ++i) {
    const auto kind = static_cast<CurveKind>(i);
    const std::string name(to_string(kind));
    if (const auto curve = root.find(name)) {
      table.curve(kind) = read_curve(*curve, stage + ": " + name);
    }
  }
  if (const auto slowdown = root.find("compute_slowdown")) {
    table.compute_slowdown = slowdown->number();
    if (*table.compute_slowdown < 1 || *table.compute_slowdown > kMostSlowdown) {
      slowdown->fail("must be from 1 (transfers do not disturb kernels) to 100.");
    }
  }
  table.to_device_beside = read_beside(root, "to_device_beside");
  table.to_host_beside = read_beside(root, "to_host_beside");
  if (const auto overhead = root.find("run_overhead_ns")) {
    table.run_overhead = Nanos{overhead->integer(0, kLongestTime.value)};
  }
  if (const auto overheads = root.find("section_overhead_ns")) {
    for (const std::string& name : overheads->keys()) {
      const auto kind = parse_section_kind(name);
      if (!kind) {
        overheads->fail("has no kind of section \"" + name +
                        "\". Known: forward, backward, inference, update.");
      }
      table.overhead(*kind) = Nanos{overheads->at(name).integer(0, kLongestTime.value)};
    }
  }
  return table;
}

}  // namespace deepcompile
