// SPDX-License-Identifier: Apache-2.0
// The simulator's queues: compute, the link between ranks, and the two
// directions of the host link. Transfers are issued in compute order, so
// whatever overlaps a kernel is known when the kernel is placed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/units.h"
#include "ir/op.h"
#include "sim/host_queues.h"

namespace deepcompile {

class Clock {
 public:
  // Kernels take `slowdown` times as long while the link is busy; at least 1.
  // `beside` is what each direction of the host link leaves the other.
  explicit Clock(double slowdown, const HostBeside& beside = {});

  Nanos now() const { return now_; }
  Nanos end() const;  // when all queues are idle, if nothing more is issued

  // How long each transfer queue is busy from now on: the link, to the host, to the device.
  using Backlog = std::array<Nanos, 3>;
  Backlog backlog() const;

  // A transfer that was issued; without a queue none was, so that it is over.
  struct Ticket {
    Resource queue = Resource::kNone;
    uint32_t number = 0;  // in its queue
  };
  // On a transfer queue: from now, or when it is free.
  Ticket transfer(Resource queue, Nanos duration);
  // Until it is over. Returns how long compute stands still.
  Nanos wait(const Ticket& ticket);

  // From here on span() is right for all that was issued, if nothing more is.
  void foresee() { host_.foresee(); }
  Span span(const Ticket& ticket) const;  // of the link's transfers it always is

  // Compute does nothing for so long; transfers go on.
  void idle(Nanos duration);
  // Runs a kernel of this undisturbed duration, stretched beside the link.
  Span kernel(Nanos duration);

 private:
  Nanos link_free() const { return link_.empty() ? Nanos{} : link_.back().end; }

  double slowdown_;
  Nanos now_;
  std::vector<Span> link_;  // its transfers, in time order
  size_t next_ = 0;         // first of them that ends after now_
  HostQueues host_;
};

}  // namespace deepcompile
