// SPDX-License-Identifier: Apache-2.0
// The simulator's queues: compute, the link between ranks, and the two
// directions of the host link. Transfers are issued in compute order, so
// whatever overlaps a kernel is known when the kernel is placed.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "base/units.h"
#include "ir/op.h"

namespace deepcompile {

struct Span {
  Nanos start, end;
};

class Clock {
 public:
  // Kernels take `slowdown` times as long while the link is busy; at least 1.
  explicit Clock(double slowdown);

  Nanos now() const { return now_; }
  Nanos end() const;  // when all queues are idle

  // How long each transfer queue is busy from now on.
  using Backlog = std::array<Nanos, kResourceCount>;
  Backlog backlog() const;

  // On a transfer queue: from now, or when it is free.
  Span transfer(Resource queue, Nanos duration);
  // Compute does nothing for so long; transfers go on.
  void idle(Nanos duration) { now_ += duration; }
  // Returns how long compute stands still.
  Nanos wait_until(Nanos time);
  // Runs a kernel of this undisturbed duration, stretched beside the link.
  Span kernel(Nanos duration);

 private:
  double slowdown_;
  Nanos now_;
  std::array<Nanos, kResourceCount> free_{};  // by queue: when it is idle
  std::vector<Span> busy_;                    // transfers on the link, in time order
  size_t next_ = 0;                           // first of them that ends after now_
};

}  // namespace deepcompile
