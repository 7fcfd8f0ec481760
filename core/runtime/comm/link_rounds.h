// SPDX-License-Identifier: Apache-2.0
// LinkRounds: keeps ranks in step over the copies of large transfers, so that at any time each
// rank's memory is copied from, or to, by one other rank.
//
// A transfer has world-1 rounds; in round d a rank copies from or to rank+d. That is a
// permutation as long as all ranks are in the same round. Ranks that drift apart meet at one
// peer, which costs more than sharing its link: of four ranks on H200 each copies at 350 to
// 385 GB/s in step, at 137 to 264 once they are not, and at about 220 if all copies run at the
// same time on a stream for each peer. Once they have met, ranks queue up behind each other and
// stay so. So a rank starts a round once whoever had the link before has said that it is done:
//
//   - in round d > 1, rank+1 had the same peer in its round d-1;
//   - in round 1, rank+2 had it in the last round of the transfer before, if both were pulls or
//     both pushes. Otherwise rank+1 itself used its link then: it pulled where this
//     rank pushes to it, or pushed where this rank pulls from it.
//
// Each is a write and a wait of a word, some microseconds. Small transfers between have no part
// in this.
//
// Why nothing hangs: all ranks have the same transfers in the same order, and a rank waits for
// earlier rounds and transfers only. Of the ranks that wait take one in the first transfer and
// round: what it waits for is done. So whoever has several transfers to start lets no wait for a
// later one come before the copies of an earlier one; telling may come as early as one likes. What
// else a rank may wait for between two of them, to make room in its memory, has to be told before
// a wait for the later one (push_reductions.h).
//
// With two ranks there is one peer and one round, and nothing to do.
//
// Callers: the copy engine transport and its reductions, under the runtime's lock.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "runtime/comm/peer_memory.h"
#include "runtime/comm/peer_signals.h"
#include "runtime/comm/transport.h"

namespace deepcompile {

class LinkRounds {
 public:
  enum class Direction { kPull, kPush };

  // `least_bytes`: of what a rank copies from or to each peer; smaller transfers, and all between
  // two ranks, have no rounds. Collective over `base`; throws TransportError on every rank if
  // one has no memory.
  LinkRounds(PeerSignals& signals, Transport& base, int64_t rank, int64_t world, c10::Device device,
             int64_t least_bytes);

  bool has(int64_t piece_bytes) const { return words_ != nullptr && piece_bytes >= least_bytes_; }
  // Of transfers that are started one after another, from `first` on, as far as the stream may wait
  // for all of them before the first one's copies: one with rounds, or all before the next with
  // rounds. The end of these; piece_bytes(i): of transfer i of `count`.
  template <typename PieceBytes>
  size_t end_of_wait(size_t first, size_t count, PieceBytes&& piece_bytes) const {
    size_t end = first + 1;
    if (has(piece_bytes(first))) return end;
    while (end < count && !has(piece_bytes(end))) ++end;
    return end;
  }
  // The next transfer with rounds: what the stream waits for before its first copy, and all that
  // it waits for until its last.
  void begin(Direction direction, PeerSignals::Steps* steps,
             std::vector<PeerSignals::Await>* awaits);
  // Its copies, from or to rank+1, rank+2, ..., on the transfers' stream. `next`: what the stream
  // has to do after them, before it waits for anything.
  void copy(const std::vector<DeviceCopy>& copies, PeerSignals::Steps* next) const;
  int64_t outside_bytes() const { return memory_.bytes(); }

 private:
  // What a rank's words are after a round.
  uint32_t after(uint32_t transfer, int64_t round) const;
  int64_t behind(int64_t distance) const;  // rank - distance
  int64_t ahead(int64_t distance) const;   // rank + distance

  PeerSignals& signals_;
  const int64_t rank_;
  const int64_t world_;
  const int64_t least_bytes_;
  PeerMemory memory_;
  at::Tensor held_;                         // what keeps it allocated
  const PeerShard* words_ = nullptr;        // null: no transfer has rounds
  uint32_t number_ = 0;                     // of the last transfer with rounds
  Direction direction_ = Direction::kPull;  // its
};

}  // namespace deepcompile
