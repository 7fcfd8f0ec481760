// SPDX-License-Identifier: Apache-2.0
#include "sim/host_queues.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace deepcompile {
namespace {

constexpr Nanos kForever{std::numeric_limits<int64_t>::max()};
constexpr int kNothing = -1;

// Of one piece of work: it may take a hundred times as long beside others.
constexpr Nanos kLongestWork{kLongestStep.value / 128};

Nanos rounded(double time) {
  return {static_cast<int64_t>(time + 0.5)};
}

[[noreturn]] void fail_too_long() {
  throw UserError(
      "[cost] the step takes years by the times of its regions, of the machine and of the cost "
      "table. Correct them.");
}

}  // namespace

void check_time(Nanos time) {
  if (time > kLongestStep) fail_too_long();
}
void check_duration(Nanos duration) {
  if (duration > kLongestWork) fail_too_long();
}

HostQueues::HostQueues(const HostBeside& beside) : beside_{beside.to_host, beside.to_device} {
  DC_CHECK(is_fraction(beside.to_host) && is_fraction(beside.to_device),
           "copies keep a fraction of their speed");
}

// On to the first end of a copy up to `limit`, and returns its direction; if
// there is none, on to the limit. With nothing under way it stays.
int HostQueues::pass(State& state, Nanos limit) const {
  const std::array<bool, 2> busy{is_busy(state, 0), is_busy(state, 1)};
  if (!busy[0] && !busy[1]) return kNothing;
  std::array<double, 2> rate{1, 1};
  if (busy[0] && busy[1]) rate = beside_;
  int first = kNothing;
  Nanos to = limit;
  for (int i = 0; i < 2; ++i) {
    if (!busy[i]) continue;
    const Nanos end = state.time + rounded(state.left[i] / rate[i]);
    if (end > to || (first != kNothing && end == to)) continue;
    first = i;
    to = end;
  }
  if (first != kNothing) check_time(to);
  const double passed = static_cast<double>((to - state.time).value);
  state.time = to;
  for (int i = 0; i < 2; ++i) {
    if (busy[i]) state.left[i] = std::max(0.0, state.left[i] - passed * rate[i]);
  }
  if (first == kNothing) return kNothing;
  const auto& queue = queues_[first];
  const uint32_t next = ++state.next[first];
  if (next < queue.size()) state.left[first] = static_cast<double>(queue[next].duration.value);
  return first;
}

// The copy before the next one has ended just now.
void HostQueues::set_spans(const State& state, size_t ended) {
  std::vector<Copy>& queue = queues_[ended];
  const uint32_t next = state.next[ended];
  queue[next - 1].span.end = state.time;
  if (next < queue.size()) queue[next].span.start = state.time;
}

uint32_t HostQueues::issue(Resource queue, Nanos now, Nanos duration) {
  check_duration(duration);
  for (int ended; (ended = pass(state_, now)) != kNothing;) set_spans(state_, ended);
  state_.time = now;
  const size_t i = way(queue);
  if (!is_busy(state_, i)) state_.left[i] = static_cast<double>(duration.value);
  queues_[i].push_back({duration, {now, now}});
  return static_cast<uint32_t>(queues_[i].size() - 1);
}

Nanos HostQueues::finish(Resource queue, uint32_t copy) {
  const size_t i = way(queue);
  while (state_.next[i] <= copy) set_spans(state_, pass(state_, kForever));
  return queues_[i][copy].span.end;
}

std::array<Nanos, 2> HostQueues::idle() const {
  State ahead = state_;
  std::array<Nanos, 2> at{ahead.time, ahead.time};
  for (int ended; (ended = pass(ahead, kForever)) != kNothing;) at[ended] = ahead.time;
  return at;
}

void HostQueues::foresee() {
  State ahead = state_;
  for (int ended; (ended = pass(ahead, kForever)) != kNothing;) set_spans(ahead, ended);
}

}  // namespace deepcompile
