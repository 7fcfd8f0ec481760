// SPDX-License-Identifier: Apache-2.0
// HostBeside: what copies to the host and copies to the device leave of each
// other's speed while both are under way.
#pragma once

#include "base/units.h"

namespace deepcompile {

// The fraction of its own speed that a direction keeps while the other one is
// busy, from kLeastBeside to 1; 1: it is not disturbed.
struct HostBeside {
  double to_device = 1;
  double to_host = 1;

  bool operator==(const HostBeside&) const = default;
};

// What times that contradict each other come to.
inline constexpr double kLeastBeside = 0.01;

inline bool is_fraction(double value) {
  return value >= kLeastBeside && value <= 1;
}

// How long some copies took in each direction.
struct HostTimes {
  Nanos to_device, to_host;
};

// From copies made in one direction after the other, and the same copies with both begun at once.
HostBeside host_beside(const HostTimes& alone, const HostTimes& together);

}  // namespace deepcompile
