// SPDX-License-Identifier: Apache-2.0
// The simulator's clock: copies over the host link that slow each other down.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <utility>
#include <vector>

#include "sim/clock.h"

namespace deepcompile::sim_clock_test {
namespace {

constexpr HostBeside kBeside{.to_device = 0.5, .to_host = 0.8};

void expect_span(const Clock& clock, const Clock::Ticket& ticket, int64_t start, int64_t end) {
  EXPECT_EQ(clock.span(ticket).start, Nanos{start});
  EXPECT_EQ(clock.span(ticket).end, Nanos{end});
}

TEST(Clock, CopiesThatCrossSlowEachOther) {
  Clock clock(1, kBeside);
  const auto out = clock.transfer(Resource::kToHost, Nanos{800});
  clock.idle(Nanos{200});
  const auto in = clock.transfer(Resource::kToDevice, Nanos{400});
  // To 200 out does 200 alone. Its 600 take 750 beside in, to 950; in does 375
  // of its 400 meanwhile, and the rest alone.
  EXPECT_EQ(clock.backlog(), (Clock::Backlog{Nanos{0}, Nanos{750}, Nanos{775}}));
  EXPECT_EQ(clock.end(), Nanos{975});
  EXPECT_EQ(clock.wait(in), Nanos{775});
  EXPECT_EQ(clock.wait(out), Nanos{0});
  EXPECT_EQ(clock.now(), Nanos{975});
  expect_span(clock, out, 0, 950);
  expect_span(clock, in, 200, 975);
}

TEST(Clock, ACopyWithinAnotherDelaysIt) {
  Clock clock(1, kBeside);
  const auto in = clock.transfer(Resource::kToDevice, Nanos{600});
  EXPECT_EQ(clock.end(), Nanos{600});
  clock.idle(Nanos{100});
  const auto out = clock.transfer(Resource::kToHost, Nanos{80});
  // out 100-200; in has 500 left at 100, 450 at 200.
  EXPECT_EQ(clock.end(), Nanos{650});
  clock.foresee();
  expect_span(clock, in, 0, 650);
  expect_span(clock, out, 100, 200);
  EXPECT_EQ(clock.now(), Nanos{100});
}

TEST(Clock, AWaitDoesNotDecideWhatIsAfterIt) {
  Clock clock(1, kBeside);
  const auto in = clock.transfer(Resource::kToDevice, Nanos{100});
  const auto out = clock.transfer(Resource::kToHost, Nanos{80});
  EXPECT_EQ(clock.wait(out), Nanos{100});
  clock.foresee();
  expect_span(clock, in, 0, 150);  // 50 left at 100
  // The next one is beside in from 100 to 150; then 25 are left.
  const auto next = clock.transfer(Resource::kToHost, Nanos{40});
  const auto last = clock.transfer(Resource::kToHost, Nanos{8});
  EXPECT_EQ(clock.wait(next), Nanos{50});
  // And beside last, 8 / 0.8, for 10: 20 left.
  EXPECT_EQ(clock.wait(in), Nanos{30});
  expect_span(clock, next, 100, 150);
  expect_span(clock, last, 150, 160);
  expect_span(clock, in, 0, 180);
}

// With nothing lost beside each other a copy ends so long after the one before it, or its issue.
TEST(Clock, UndisturbedQueuesAreAsIfAlone) {
  for (uint32_t seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    Clock clock(1);
    std::array<Nanos, 3> free{};
    std::vector<std::pair<Clock::Ticket, Span>> issued;
    for (int i = 0; i < 60; ++i) {
      const Nanos time{static_cast<int64_t>(random() % 1000)};
      if (random() % 3 == 0) clock.idle(time);
      if (random() % 4 == 0 && !issued.empty()) {
        const auto& [ticket, span] = issued[random() % issued.size()];
        const Nanos stall = std::max(Nanos{0}, span.end - clock.now());
        ASSERT_EQ(clock.wait(ticket), stall) << seed;
      }
      const size_t queue = random() % 3;
      const Nanos duration{random() % 5 == 0 ? 0 : time.value};
      const Nanos start = std::max(clock.now(), free[queue]);
      free[queue] = start + duration;
      const Resource of =
          std::array{Resource::kLink, Resource::kToHost, Resource::kToDevice}[queue];
      issued.push_back({clock.transfer(of, duration), {start, free[queue]}});
      for (size_t q = 0; q < free.size(); ++q) {
        ASSERT_EQ(clock.backlog()[q], std::max(Nanos{0}, free[q] - clock.now())) << seed;
      }
    }
    clock.foresee();
    for (const auto& [ticket, span] : issued) {
      ASSERT_EQ(clock.span(ticket).start, span.start) << seed;
      ASSERT_EQ(clock.span(ticket).end, span.end) << seed;
    }
  }
}

}  // namespace
}  // namespace deepcompile::sim_clock_test
