// SPDX-License-Identifier: Apache-2.0
// PeerSignals: how streams of different ranks wait for each other, by words of
// PeerMemory. Every wait is watched: a peer that stays away is named in time.
//
// Callers: the copy engine transport and its reductions, under the runtime's lock.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "runtime/comm/driver.h"
#include "runtime/comm/peer_memory.h"
#include "runtime/comm/stall_watch.h"
#include "runtime/comm/stream_pair.h"

namespace deepcompile {

class PeerSignals {
 public:
  // `streams`: null on a CPU, where each action is over when it returns.
  PeerSignals(std::shared_ptr<const Driver> driver, int64_t rank, int64_t world,
              std::chrono::milliseconds timeout, std::shared_ptr<const StreamPair> streams);

  const std::shared_ptr<const Driver>& driver() const { return driver_; }
  const StreamPair* streams() const { return streams_.get(); }
  std::optional<c10::Stream> comm() const;
  std::optional<c10::Stream> compute() const;
  // The driver's handle of a stream of torch's; null for none.
  static Driver::Stream handle(const std::optional<c10::Stream>& stream);

  // Throws TransportError if some wait was in vain.
  void check() const { watch_.check(); }

  // Steps of a stream, what tells peers something before what waits for them.
  struct Steps {
    std::vector<MemoryOp> writes, waits;
    std::vector<DeviceCopy> copies;  // of words that were written here, to peers
  };
  static constexpr int64_t kAll = -1;
  // Writing `value` to this rank's word on every rank, or on one.
  void tell(Steps* steps, const PeerShard& shard, uint32_t value, int64_t on = kAll) const;
  // A wait until the words of a shard here, or that of one rank, are at least `value`.
  struct Await {
    const PeerShard* shard;
    uint32_t value;
    int64_t from = kAll;
  };
  void await(Steps* steps, const Await& words) const;
  void run(Steps steps, const std::optional<c10::Stream>& stream) const;

  // For messages: "the gather of", and whether the shard's name follows.
  struct What {
    const char* text;
    bool named = false;
  };
  // Runs `action`, which makes `stream` wait for all of these, if there are any.
  // What follows all that it gave the stream; null on a CPU.
  template <typename Action>
  Mark watched(const What& what, const std::vector<Await>& awaits,
               const std::optional<c10::Stream>& stream, Action&& action);
  // Makes `stream` wait for them, and do nothing else.
  void watched_wait(const What& what, const std::vector<Await>& awaits,
                    const std::optional<c10::Stream>& stream);

 private:
  WatchedWait wait_for(const What& what, const std::vector<Await>& awaits) const;

  const std::shared_ptr<const Driver> driver_;
  const int64_t rank_;
  const int64_t world_;
  const std::shared_ptr<const StreamPair> streams_;
  StallWatch watch_;
};

template <typename Action>
Mark PeerSignals::watched(const What& what, const std::vector<Await>& awaits,
                          const std::optional<c10::Stream>& stream, Action&& action) {
  if (awaits.empty()) {
    action();
    return stream ? streams_->mark(*stream) : nullptr;
  }
  WatchedWait wait = wait_for(what, awaits);
  if (stream) {
    action();
    Mark done = streams_->mark(*stream);
    wait.over = [done] { return done->query(); };
    watch_.add(std::move(wait));
    return done;
  }
  auto over = std::make_shared<std::atomic<bool>>(false);
  wait.over = [over] { return over->load(); };
  watch_.add(std::move(wait));
  action();
  *over = true;
  watch_.check();
  return nullptr;
}

}  // namespace deepcompile
