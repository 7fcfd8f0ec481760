// SPDX-License-Identifier: Apache-2.0
#include "cost/host_beside.h"

#include <algorithm>

namespace deepcompile {
namespace {

// Both were busy for `both`; what was left then went at the direction's own speed.
double fraction(Nanos alone, Nanos together, Nanos both) {
  if (both.value <= 0) return 1;
  const double done = static_cast<double>((alone - (together - both)).value);
  return std::clamp(done / static_cast<double>(both.value), kLeastBeside, 1.0);
}

}  // namespace

HostBeside host_beside(const HostTimes& alone, const HostTimes& together) {
  const Nanos both = std::min(together.to_device, together.to_host);
  return {fraction(alone.to_device, together.to_device, both),
          fraction(alone.to_host, together.to_host, both)};
}

}  // namespace deepcompile
