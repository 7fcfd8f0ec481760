// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/copy_trial.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "base/error.h"
#include "runtime/comm/peer_memory.h"
#include "runtime/trace.h"

namespace deepcompile {
namespace {

constexpr int64_t kTrialBytes = 64 << 20;  // from each peer
constexpr int kTrials = 4;                 // the first one warms up
// What copies in turn take at the worst is twice what copies at the same time take.
constexpr double kMuchLonger = 1.3;

using Copies = std::vector<DeviceCopy>;
using Nanoseconds = std::array<int64_t, 2>;  // in turn, in step; together, at the worst

// The shortest of a few trials, which all ranks begin together.
int64_t shortest_ns(Transport& base, const Driver& driver, const StreamPair& streams,
                    const Copies& copies, bool together) {
  int64_t shortest = std::numeric_limits<int64_t>::max();
  for (int i = 0; i < kTrials; ++i) {
    base.barrier();
    streams.comm_follows_compute();
    Span span{SpanId{}};
    span.start(streams.comm());
    driver.copy(copies, streams.comm().native_handle(), together);
    span.stop(streams.comm());
    const int64_t ns = span.elapsed_ns();
    if (i > 0) shortest = std::min(shortest, ns);
  }
  return shortest;
}

// Of the slowest rank.
Nanoseconds slowest(RankMessages& messages, const Nanoseconds& mine) {
  const std::string text(reinterpret_cast<const char*>(&mine), sizeof(mine));
  Nanoseconds most{};
  for (const std::string& other : messages.exchange(text, sizeof(mine))) {
    Nanoseconds theirs;
    std::memcpy(&theirs, other.data(), sizeof(theirs));
    for (size_t i = 0; i < most.size(); ++i) most[i] = std::max(most[i], theirs[i]);
  }
  return most;
}

// By the slowest rank's nanoseconds.
CopyTrial judge_copies(int64_t in_turn, int64_t together) {
  const double ratio = static_cast<double>(together) / static_cast<double>(in_turn);
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "%.2f", ratio);
  const bool faster = ratio < kMuchLonger;
  return {faster, std::string("copies from or to several peers run ") +
                      (faster ? "together" : "in turn") +
                      ": all reading one peer first, they take " + text.data() +
                      " times as long as in turn and in step"};
}

}  // namespace

CopyTrial try_copies(RankMessages& messages, Transport& base,
                     const std::shared_ptr<const Driver>& driver, int64_t rank, int64_t world,
                     const StreamPair& streams) {
  const auto options = c10::TensorOptions().dtype(c10::kByte).device(streams.device());
  PeerMemory memory(driver, rank, world, streams.device());
  memory.used_on(streams.comm().native_handle());
  at::Tensor mine, received;
  std::string error;
  try {
    if (!driver->copies_together()) throw UserError("the driver is older than CUDA 13");
    mine = memory.allocate("trial of copies", kTrialBytes, /*in_place=*/false, options);
    received = at::empty({world, kTrialBytes}, options);
  } catch (const c10::OutOfMemoryError&) {
    error = "there was no memory to try them together";
  } catch (const UserError& none) {
    error = none.what();
  }
  for (const std::string& each : messages.errors(error)) {
    if (!each.empty()) return {false, "copies from or to several peers run in turn: " + each};
  }
  memory.map(messages);
  const PeerShard& shard = *memory.find(mine.const_data_ptr());
  const auto copy_from = [&](int64_t peer) {
    return DeviceCopy{reinterpret_cast<DeviceAddress>(received[peer].const_data_ptr()),
                      shard.source(peer), kTrialBytes};
  };
  Copies in_step, at_worst;
  for (int64_t d = 1; d < world; ++d) in_step.push_back(copy_from((rank + d) % world));
  for (int64_t peer = 0; peer < world; ++peer) {
    if (peer != rank) at_worst.push_back(copy_from(peer));
  }
  const Nanoseconds most =
      slowest(messages, {shortest_ns(base, *driver, streams, in_step, /*together=*/false),
                         shortest_ns(base, *driver, streams, at_worst, /*together=*/true)});
  base.barrier();  // before anyone lets go of its shard
  return judge_copies(most[0], most[1]);
}

}  // namespace deepcompile
