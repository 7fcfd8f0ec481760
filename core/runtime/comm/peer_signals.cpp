// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/peer_signals.h"

namespace deepcompile {

PeerSignals::PeerSignals(std::shared_ptr<const Driver> driver, int64_t rank, int64_t world,
                         std::chrono::milliseconds timeout,
                         std::shared_ptr<const StreamPair> streams)
    : driver_(std::move(driver)),
      rank_(rank),
      world_(world),
      streams_(std::move(streams)),
      watch_(driver_, timeout) {}

std::optional<c10::Stream> PeerSignals::comm() const {
  return streams_ ? std::optional<c10::Stream>(streams_->comm()) : std::nullopt;
}

std::optional<c10::Stream> PeerSignals::compute() const {
  return streams_ ? std::optional<c10::Stream>(streams_->compute()) : std::nullopt;
}

Driver::Stream PeerSignals::handle(const std::optional<c10::Stream>& stream) {
  return stream ? stream->native_handle() : nullptr;
}

void PeerSignals::tell(Steps* steps, const PeerShard& shard, uint32_t value, int64_t on) const {
  const DeviceAddress mine = shard.word(rank_, rank_);
  const auto tell_one = [&](int64_t rank) {
    const DeviceAddress word = shard.word(rank, rank_);
    if (driver_->copies_words() && word != mine) {
      steps->copies.push_back({word, mine, sizeof(value)});
    } else {
      steps->writes.push_back({MemoryOp::Kind::kWrite, word, value});
    }
  };
  if (on == kAll) {
    for (int64_t d = 1; d <= world_; ++d) tell_one((rank_ + d) % world_);
    return;
  }
  if (driver_->copies_words()) tell_one(rank_);  // what is copied from here
  tell_one(on);
}

void PeerSignals::await(Steps* steps, const Await& words) const {
  for (int64_t d = 1; d <= world_; ++d) {
    const int64_t rank = (rank_ + d) % world_;
    if (words.from != kAll && words.from != rank) continue;
    steps->waits.push_back(
        {MemoryOp::Kind::kWaitAtLeast, words.shard->word(rank_, rank), words.value});
  }
}

void PeerSignals::run(Steps steps, const std::optional<c10::Stream>& stream) const {
  const Driver::Stream on = handle(stream);
  std::vector<MemoryOp> ops = std::move(steps.writes);
  if (!steps.copies.empty()) {
    driver_->run(std::exchange(ops, {}), on);
    driver_->copy(steps.copies, on);
  }
  ops.insert(ops.end(), steps.waits.begin(), steps.waits.end());
  driver_->run(std::move(ops), on);
}

WatchedWait PeerSignals::wait_for(const What& what, const std::vector<Await>& awaits) const {
  WatchedWait wait;
  wait.awaited.reserve(awaits.size());
  for (const auto& [shard, value, from] : awaits) {
    AwaitedWords& words = wait.awaited.emplace_back();
    words.what = what.text;
    if (what.named) words.name = shard->name;
    words.value = value;
    for (int64_t rank = 0; rank < world_; ++rank) {
      if (from == kAll || from == rank) words.words.push_back({rank, shard->word(rank_, rank)});
    }
  }
  return wait;
}

void PeerSignals::watched_wait(const What& what, const std::vector<Await>& awaits,
                               const std::optional<c10::Stream>& stream) {
  watched(what, awaits, stream, [&] {
    Steps steps;
    for (const Await& words : awaits) await(&steps, words);
    run(std::move(steps), stream);
  });
}

}  // namespace deepcompile
