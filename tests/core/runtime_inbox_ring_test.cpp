// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "base/error.h"
#include "runtime/comm/inbox_ring.h"

namespace deepcompile::runtime_inbox_ring_test {
namespace {

TEST(InboxRing, PlacesFollowEachOtherAndGoRound) {
  InboxRing ring(100);
  const auto put = [&](int64_t bytes, uint64_t number) {
    const InboxRing::Place place = ring.next(bytes);
    ring.take(place, bytes, number);
    return std::pair(place.begin, place.after);
  };
  EXPECT_EQ(put(40, 1), std::pair(int64_t{0}, uint64_t{0}));
  EXPECT_EQ(put(40, 2), std::pair(int64_t{40}, uint64_t{0}));
  EXPECT_EQ(put(40, 3), std::pair(int64_t{0}, uint64_t{1}));  // 20 bytes do not hold it
  EXPECT_EQ(put(30, 4), std::pair(int64_t{40}, uint64_t{2}));
  EXPECT_EQ(put(30, 5), std::pair(int64_t{70}, uint64_t{2}));  // the rest of 2's place
  EXPECT_EQ(put(100, 6), std::pair(int64_t{0}, uint64_t{5}));
  EXPECT_EQ(ring.next(10).after, 6u);
  EXPECT_THROW(ring.next(101), InternalError);
  EXPECT_THROW(ring.next(0), InternalError);
}

TEST(InboxRing, WaitsForTheLastOfThoseWhosePlaceItTakes) {
  std::mt19937 random(3);
  const int64_t capacity = 1000;
  InboxRing ring(capacity);
  std::vector<uint64_t> owner(capacity, 0);  // of each byte
  for (uint64_t number = 1; number < 5000; ++number) {
    const int64_t bytes = 1 + static_cast<int64_t>(random() % (number % 3 ? 200 : capacity));
    const InboxRing::Place place = ring.next(bytes);
    ASSERT_GE(place.begin, 0);
    ASSERT_LE(place.begin + bytes, capacity);
    const auto first = owner.begin() + place.begin;
    ASSERT_EQ(place.after, *std::max_element(first, first + bytes)) << number;
    std::fill(first, first + bytes, number);
    ring.take(place, bytes, number);
  }
}

}  // namespace
}  // namespace deepcompile::runtime_inbox_ring_test
