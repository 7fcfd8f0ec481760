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

void PeerSignals::tell(std::vector<MemoryOp>* ops, const PeerShard& shard, uint32_t value) const {
  for (int64_t d = 1; d <= world_; ++d) {
    const int64_t rank = (rank_ + d) % world_;
    ops->push_back({MemoryOp::Kind::kWrite, shard.word(rank, rank_), value});
  }
}

void PeerSignals::await(std::vector<MemoryOp>* ops, const PeerShard& shard, uint32_t value) const {
  for (int64_t d = 1; d <= world_; ++d) {
    const int64_t rank = (rank_ + d) % world_;
    ops->push_back({MemoryOp::Kind::kWaitAtLeast, shard.word(rank_, rank), value});
  }
}

WatchedWait PeerSignals::wait_for(const What& what, const std::vector<Await>& awaits) const {
  WatchedWait wait;
  wait.awaited.reserve(awaits.size());
  for (const auto& [shard, value] : awaits) {
    AwaitedWords& words = wait.awaited.emplace_back();
    words.what = what.text;
    if (what.named) words.name = shard->name;
    words.value = value;
    for (int64_t rank = 0; rank < world_; ++rank) {
      words.words.push_back(shard->word(rank_, rank));
    }
  }
  return wait;
}

void PeerSignals::watched_wait(const What& what, const std::vector<Await>& awaits,
                               const std::optional<c10::Stream>& stream) {
  watched(what, awaits, stream, [&] {
    std::vector<MemoryOp> ops;
    for (const auto& [shard, value] : awaits) await(&ops, *shard, value);
    driver_->run(std::move(ops), handle(stream));
  });
}

}  // namespace deepcompile
