// SPDX-License-Identifier: Apache-2.0
#include "sim/memory_curve.h"

#include <algorithm>

#include "base/error.h"

namespace deepcompile {

MemoryCurve::Result MemoryCurve::finish() && {
  std::stable_sort(changes_.begin(), changes_.end(),
                   [](const Change& a, const Change& b) { return a.time < b.time; });
  Result result{resident_, {{Nanos{0}, resident_}}};
  Bytes now = resident_;
  for (const Change& change : changes_) {
    now += Bytes{change.bytes};
    DC_CHECK(now.value >= 0, "more bytes freed than allocated");
    result.peak = std::max(result.peak, now);
    if (result.points.back().time == change.time) {
      result.points.back().bytes = now;
    } else {
      result.points.push_back({change.time, now});
    }
  }
  return result;
}

}  // namespace deepcompile
