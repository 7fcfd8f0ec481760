// SPDX-License-Identifier: Apache-2.0
#include "sim/clock.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace deepcompile {

Clock::Clock(double slowdown, const HostBeside& beside) : slowdown_(slowdown), host_(beside) {
  DC_CHECK(slowdown >= 1, "transfers cannot speed kernels up");
}

Nanos Clock::end() const {
  const auto [out, in] = host_.idle();
  return std::max({now_, link_free(), out, in});
}

Clock::Backlog Clock::backlog() const {
  const auto [out, in] = host_.idle();
  const auto from_now = [&](Nanos free) { return std::max(Nanos{0}, free - now_); };
  return {from_now(link_free()), from_now(out), from_now(in)};
}

void Clock::idle(Nanos duration) {
  check_duration(duration);
  check_time(now_);
  now_ += duration;
}

Clock::Ticket Clock::transfer(Resource queue, Nanos duration) {
  if (queue != Resource::kLink) return {queue, host_.issue(queue, now_, duration)};
  const Nanos start = std::max(now_, link_free());
  check_duration(duration);
  check_time(start + duration);
  link_.push_back({start, start + duration});
  return {queue, static_cast<uint32_t>(link_.size() - 1)};
}

Nanos Clock::wait(const Ticket& ticket) {
  if (ticket.queue == Resource::kNone) return Nanos{0};
  const bool link = ticket.queue == Resource::kLink;
  const Nanos over = link ? link_[ticket.number].end : host_.finish(ticket.queue, ticket.number);
  const Nanos stall = std::max(Nanos{0}, over - now_);
  now_ += stall;
  return stall;
}

Span Clock::span(const Ticket& ticket) const {
  if (ticket.queue == Resource::kLink) return link_[ticket.number];
  return host_.span(ticket.queue, ticket.number);
}

Span Clock::kernel(Nanos duration) {
  check_duration(duration);
  check_time(now_);
  const Nanos start = now_;
  double left = static_cast<double>(duration.value);
  while (left > 0) {
    while (next_ < link_.size() && link_[next_].end <= now_) ++next_;
    if (next_ == link_.size()) {
      now_ += Nanos{std::llround(left)};
      break;
    }
    const Span& span = link_[next_];
    const bool beside = span.start <= now_;
    const double rate = beside ? slowdown_ : 1;  // time per unit of work
    const Nanos limit = (beside ? span.end : span.start) - now_;
    if (left * rate <= static_cast<double>(limit.value)) {
      now_ += Nanos{std::llround(left * rate)};
      break;
    }
    now_ += limit;
    left -= static_cast<double>(limit.value) / rate;
  }
  return {start, now_};
}

}  // namespace deepcompile
