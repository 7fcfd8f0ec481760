// SPDX-License-Identifier: Apache-2.0
#include "sim/clock.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace deepcompile {

Clock::Clock(double slowdown) : slowdown_(slowdown) {
  DC_CHECK(slowdown >= 1, "transfers cannot speed kernels up");
}

Nanos Clock::end() const {
  return std::max(now_, *std::max_element(free_.begin(), free_.end()));
}

Clock::Backlog Clock::backlog() const {
  Backlog out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = std::max(Nanos{0}, free_[i] - now_);
  return out;
}

Span Clock::transfer(Resource queue, Nanos duration) {
  Nanos& free = free_[static_cast<size_t>(queue)];
  const Nanos start = std::max(now_, free);
  free = start + duration;
  if (queue == Resource::kLink && duration.value > 0) busy_.push_back({start, free});
  return {start, free};
}

Nanos Clock::wait_until(Nanos time) {
  const Nanos stall = std::max(Nanos{0}, time - now_);
  now_ += stall;
  return stall;
}

Span Clock::kernel(Nanos duration) {
  const Nanos start = now_;
  double left = static_cast<double>(duration.value);
  while (left > 0) {
    while (next_ < busy_.size() && busy_[next_].end <= now_) ++next_;
    if (next_ == busy_.size()) {
      now_ += Nanos{std::llround(left)};
      break;
    }
    const Span& span = busy_[next_];
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
