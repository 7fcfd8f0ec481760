// SPDX-License-Identifier: Apache-2.0
#include "sim/memory_curve.h"

#include <algorithm>

#include "base/error.h"

namespace deepcompile {

void MemoryCurve::begin(Nanos origin) {
  origin_ = origin;
  start_ = peak_ = now_;
  points_.assign(keeps_points_ ? 1 : 0, {Nanos{0}, now_});
}

void MemoryCurve::change(Nanos time, int64_t bytes) {
  now_ += Bytes{bytes};
  DC_CHECK(now_.value >= 0, "more bytes freed than allocated");
  peak_ = std::max(peak_, now_);
  if (!keeps_points_ || bytes == 0) return;
  const Nanos at = time - origin_;
  if (points_.back().time == at) {
    points_.back().bytes = now_;
  } else {
    points_.push_back({at, now_});
  }
}

}  // namespace deepcompile
