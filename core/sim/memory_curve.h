// SPDX-License-Identifier: Apache-2.0
// Adds up allocations that come in issue order, not in time order, into a
// curve of bytes over simulated time. Used by the simulator.
#pragma once

#include <vector>

#include "base/units.h"
#include "sim/simulator.h"

namespace deepcompile {

class MemoryCurve {
 public:
  explicit MemoryCurve(Bytes resident) : resident_(resident) {}

  void allocate(Nanos time, Bytes bytes) { change(time, bytes.value); }
  void free(Nanos time, Bytes bytes) { change(time, -bytes.value); }

  // The curve, and its highest point. Changes at one time take effect in the
  // order in which they were made, so a peak between two of them counts.
  struct Result {
    Bytes peak;
    std::vector<MemoryPoint> points;
  };
  Result finish() &&;

 private:
  struct Change {
    Nanos time;
    int64_t bytes;
  };

  void change(Nanos time, int64_t bytes) {
    if (bytes != 0) changes_.push_back({time, bytes});
  }

  Bytes resident_;
  std::vector<Change> changes_;
};

}  // namespace deepcompile
