// SPDX-License-Identifier: Apache-2.0
// Reductions by copy engine: every rank pushes the pieces of its gradient into
// the memory of the ranks that own them, and each owner adds up what arrived.
// No multiprocessor works beside compute but for the sum, which reads each piece
// once and runs on the compute stream where the result is waited for.
//
// Pieces arrive in an inbox, a ring of PeerMemory on each rank. Reduction number
// n has a place in it that follows from the sizes of those before it alone, so
// it is the same on every rank. Reductions m to n may go together. On the transfers'
// stream of each rank:
//
//   1. wait until every rank's word "freed" is at least k, the last reduction
//      whose place one of these takes;
//   2. copy the pieces of rank+1, rank+2, ... into that rank's inbox, for each of them, ranks
//      in step (link_rounds.h);
//   3. write n to every rank's word "arrived".
//
// Reductions of a batch do this one after another; those without rounds do it together, up to
// the next with rounds.
//
// and on the compute stream, when some are waited for: wait until every word
// "arrived" is at least the last of them, and add the pieces up in the order of ranks
// (PieceSum). The last number up to which all sums are done here is written to "freed"
// together with the next such wait, or before a step 1 that needs it: each such step
// interrupts the kernels.
//
// Why that is enough:
// - One of the words "arrived" is this rank's own, written after its pushes: the
//   gradient's memory is free for compute then, without an event.
// - Before n is started, all of 1 to k are waited for, and said to be free, on
//   every rank: so what step 1 waits for is given to the peers' streams before
//   their own step 1 of n. All ranks give their streams the same work in the same
//   order, so no wait needs anything that comes after it, and nothing hangs. Which
//   reductions go together may differ between ranks: a wait for one that is held
//   back starts it first.
// - A rank short of memory waits for sums between two reductions that go together elsewhere
//   (Relief). What it waits for was told before a peer waits for the next; and as it waits in
//   the order of their numbers, it has freed all places that a peer's batch with the one it waits
//   for can take.
// - Sums are in f32 with one rounding, in the order of ranks: the same bits under
//   every plan. With two ranks they are those of a sum in the gradient's type.
// - Numbers are compared as differences, so the 32 bits of a word may go round.
//
// Pushing into memory that the owner sums is how NCCL's copy engine collectives
// and PyTorch's symmetric memory move data; their reductions use kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "runtime/comm/inbox_ring.h"
#include "runtime/comm/link_rounds.h"
#include "runtime/comm/peer_memory.h"
#include "runtime/comm/peer_signals.h"
#include "runtime/comm/piece_sum.h"
#include "runtime/comm/transport.h"

namespace deepcompile {

class PushReductions {
 public:
  // `least_bytes`: of a piece; smaller ones are not taken. `give`: starts what is held back.
  PushReductions(PeerSignals& signals, LinkRounds& rounds, int64_t rank, int64_t world,
                 c10::Device device, int64_t least_bytes, std::function<void()> give);
  ~PushReductions();

  // A reduction will have pieces of so many bytes: the inbox will hold two such.
  // Before the first start; the same calls on every rank.
  void expect(int64_t piece_bytes);
  // Whether reductions with such pieces go this way.
  bool takes(int64_t piece_bytes) const;
  // As Transport::prepare_reduction. The first call makes and maps the inboxes over
  // `base`: UserError on every rank if one has no memory.
  void prepare(int64_t piece_bytes, Transport& base);
  // As Transport::reduce_scatter; prepares what is not. Held back until `push`.
  // The reduction's number; they count up.
  uint64_t hold(at::Tensor piece, at::Tensor full, std::shared_ptr<Span> span, Transport& base);
  // Starts these, in their order, all that are held back or the first of them. `given`:
  // the number of the first among all transfers.
  void push(const std::vector<uint64_t>& numbers, uint64_t given);
  std::unique_ptr<Transfer> transfer(uint64_t number);

  // While it is on, sums that may be are put off until `sum_up`.
  void set_put_off(bool on) { put_off_ = on; }
  // What was put off. Transfers that were given before the one of this number are over
  // on every rank, for compute's next work.
  uint64_t sum_up();
  int64_t outside_bytes() const { return memory_ ? memory_->bytes() : 0; }

 private:
  class Push;
  struct UnderWay {
    int64_t begin;                           // in the inbox
    int64_t bytes;                           // of a piece
    uint64_t after;                          // the last reduction whose place it takes
    at::Tensor piece;                        // undefined: nobody wants the sum
    at::Tensor full;                         // until the sum has read its part
    std::shared_ptr<Span> span;              // of the pushes
    uint64_t given = 0;                      // its number among all transfers; 0: held back
    std::optional<RunningTotal> total = {};  // of the sum, instead of the piece
  };

  void make_inbox(Transport& base);
  int64_t room_for(int64_t piece_bytes) const;  // in the ring
  void await_room(uint64_t after);
  void push(UnderWay& reduction, PeerSignals::Steps* next);
  void ask(uint64_t number);                             // for its sum; nothing if it was asked for
  bool add_to(uint64_t number, const RunningTotal& to);  // false: it was, or cannot be
  void finish(uint64_t number);                          // and all before it; nothing if it was
  void tell_freed(PeerSignals::Steps* steps);            // nothing if all know
  void drop(uint64_t number);
  std::vector<const void*> pieces_of(const UnderWay& reduction) const;  // in the order of ranks
  // Where the piece of `source` lies in the inbox of `owner`, as this rank sees it.
  DeviceAddress slot(int64_t owner, int64_t source, const UnderWay& reduction) const;

  PeerSignals& signals_;
  LinkRounds& rounds_;
  const int64_t rank_;
  const int64_t world_;
  const c10::Device device_;
  const int64_t least_bytes_;
  const std::function<void()> give_;
  PieceSum piece_sum_;
  int64_t largest_ = 0;  // expected piece, in bytes
  std::unique_ptr<PeerMemory> memory_;
  const PeerShard* inbox_ = nullptr;  // its words: "arrived"
  const PeerShard* freed_ = nullptr;  // words only
  at::Tensor held_[2];                // what keeps both allocated
  std::optional<InboxRing> ring_;
  bool put_off_ = false;
  uint64_t last_ = 0;     // number
  uint64_t settled_ = 0;  // up to which all ranks are known to have freed
  uint64_t summed_ = 0;   // up to which all sums are done here, on compute
  uint64_t told_ = 0;     // up to which this rank told so
  std::map<uint64_t, UnderWay> under_way_;
  std::map<uint64_t, UnderWay> asked_;  // whose sums are put off
  uint64_t over_ = 0;                   // see sum_up
};

}  // namespace deepcompile
