// SPDX-License-Identifier: Apache-2.0
// LinkRounds: keeps ranks in step over the copies of large transfers, so that at any time each
// rank's memory is copied from, or to, by one other rank.
//
// A transfer has world-1 rounds; in round d a rank copies from or to rank+d. That is a
// permutation as long as all ranks are in the same round. Ranks that drift apart meet at one
// peer, which costs more than sharing its link: of four ranks on H200 each copies at 350 to
// 385 GB/s in step, at 137 to 264 once they are not, and at about 220 if all copies run at the
// same time on a stream for each peer. Once they have met, ranks queue up behind each other and
// stay so. In training, where nothing else than the gathers' start kept them in step, reductions
// ran at 264 GB/s in the mean. So:
//
//   - a transfer starts once all ranks have come to it: each writes its number to all words;
//   - a round starts once the rank that copied from or to the same peer in the round before,
//     which is rank+1, has said so: a write and a wait of a word, some microseconds.
//
// Why nothing hangs: all ranks have the same transfers in the same order, and a rank waits in
// transfer n only for what others do in transfers up to n, in n only for earlier rounds. Of
// the ranks that wait take one in the first transfer and round: what it waits for was done.
// So whoever has several transfers to start makes no wait of a later one before an earlier one's
// copies (PeerSignals::tell may come as early as one likes).
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
  // `least_bytes`: of what a rank copies from or to each peer; smaller transfers, and all between
  // two ranks, have no rounds. Collective over `base`; throws TransportError on every rank if one has no
  // memory.
  LinkRounds(PeerSignals& signals, Transport& base, int64_t rank, int64_t world,
             c10::Device device, int64_t least_bytes);

  bool has(int64_t piece_bytes) const { return words_ != nullptr && piece_bytes >= least_bytes_; }
  // The next transfer with rounds: what the stream does before its first copy, and all that it
  // waits for until its last.
  void begin(PeerSignals::Steps* steps, std::vector<PeerSignals::Await>* awaits);
  // Its copies, from or to rank+1, rank+2, ..., on the transfers' stream.
  void copy(const std::vector<DeviceCopy>& copies) const;
  int64_t outside_bytes() const { return memory_.bytes(); }

 private:
  uint32_t done(int64_t round) const;  // what a rank's words are after it

  PeerSignals& signals_;
  const int64_t rank_;
  const int64_t world_;
  const int64_t least_bytes_;
  PeerMemory memory_;
  at::Tensor held_;                   // what keeps it allocated
  const PeerShard* words_ = nullptr;  // null: no transfer has rounds
  uint32_t number_ = 0;               // of the last transfer with rounds
};

}  // namespace deepcompile
