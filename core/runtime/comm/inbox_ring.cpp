// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/inbox_ring.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace deepcompile {

InboxRing::Place InboxRing::next(int64_t bytes) const {
  DC_CHECK(bytes > 0 && bytes <= capacity_, "a reduction is larger than the inbox");
  Place place{head_ + bytes > capacity_ ? 0 : head_, 0};
  for (const Use& use : uses_) {
    const bool overlaps = use.begin < place.begin + bytes && place.begin < use.end;
    if (overlaps) place.after = std::max(place.after, use.number);
  }
  return place;
}

void InboxRing::take(const Place& place, int64_t bytes, uint64_t number) {
  const int64_t begin = place.begin, end = begin + bytes;
  std::vector<Use> kept;
  for (const Use& use : uses_) {
    if (use.begin < begin) kept.push_back({use.begin, std::min(use.end, begin), use.number});
    if (use.end > end) kept.push_back({std::max(use.begin, end), use.end, use.number});
  }
  kept.push_back({begin, end, number});
  uses_ = std::move(kept);
  head_ = end;
}

}  // namespace deepcompile
