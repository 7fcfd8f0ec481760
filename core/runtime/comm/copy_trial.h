// SPDX-License-Identifier: Apache-2.0
// Whether copies from several peers run at the same time if they are given together.
//
// Ranks in training are never quite in step, and copies that run one after another
// then meet at one peer and share its link, while other links stand idle. Copies
// that run at the same time share every link evenly, whoever is ahead. What a driver
// makes of copies that are given together it does not say, so it is tried, with the
// worst case: all ranks read from rank 0 first, then from rank 1, and so on. Copies
// at the same time take as long then as copies in turn take in step; copies in turn
// take twice as long.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "runtime/comm/driver.h"
#include "runtime/comm/rank_messages.h"
#include "runtime/comm/stream_pair.h"
#include "runtime/comm/transport.h"

namespace deepcompile {

struct CopyTrial {
  bool together = false;
  std::string why;
};

// By the times that all ranks took; the same answer on every rank. In turn where it cannot be
// told: the driver is too old, or a rank has no memory for it. Collective; the host waits.
CopyTrial try_copies(RankMessages& messages, Transport& base,
                     const std::shared_ptr<const Driver>& driver, int64_t rank, int64_t world,
                     const StreamPair& streams);

}  // namespace deepcompile
