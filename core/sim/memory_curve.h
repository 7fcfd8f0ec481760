// SPDX-License-Identifier: Apache-2.0
// Adds up allocations into a curve of bytes over simulated time and its
// highest point. Used by the simulator. Buffers come and go when compute
// reaches them, so times never fall.
#pragma once

#include <vector>

#include "base/units.h"
#include "sim/simulator.h"

namespace deepcompile {

class MemoryCurve {
 public:
  // With `points`, keeps the curve; otherwise the peak alone.
  MemoryCurve(Bytes resident, bool points) : now_(resident), keeps_points_(points) {}

  // A new curve from here on, with times relative to `origin`.
  void begin(Nanos origin);

  void change(Nanos time, int64_t bytes);

  Bytes now() const { return now_; }
  Bytes start() const { return start_; }
  // Between two changes at one time counts.
  Bytes peak() const { return peak_; }
  std::vector<MemoryPoint> take_points() { return std::move(points_); }

 private:
  Bytes now_, start_, peak_;
  bool keeps_points_;
  Nanos origin_;
  std::vector<MemoryPoint> points_;
};

}  // namespace deepcompile
