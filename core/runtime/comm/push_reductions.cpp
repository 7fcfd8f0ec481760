// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/push_reductions.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace deepcompile {
// A reduction under way.
class PushReductions::Push final : public Transfer {
 public:
  Push(PushReductions& reductions, uint64_t number) : reductions_(reductions), number_(number) {}
  ~Push() override {
    try {
      reductions_.drop(number_);
    } catch (...) {  // the device is lost; whoever uses it next reports that
    }
  }
  void wait() override { reductions_.finish(number_); }

 private:
  PushReductions& reductions_;
  uint64_t number_;
};

PushReductions::PushReductions(PeerSignals& signals, int64_t rank, int64_t world,
                               c10::Device device, int64_t least_bytes, CopyKind copies)
    : signals_(signals),
      rank_(rank),
      world_(world),
      device_(device),
      least_bytes_(least_bytes),
      copies_(copies),
      piece_sum_(device) {}

PushReductions::~PushReductions() = default;

void PushReductions::expect(int64_t piece_bytes) {
  DC_CHECK(memory_ == nullptr || piece_bytes <= largest_,
           "a reduction larger than all before, after the first was started");
  if (piece_bytes >= least_bytes_) largest_ = std::max(largest_, piece_bytes);
}

bool PushReductions::takes(int64_t piece_bytes) const {
  return piece_bytes > 0 && piece_bytes >= least_bytes_ && piece_bytes <= largest_;
}

void PushReductions::make_inbox(Transport& base) {
  RankMessages messages(base, device_, world_);
  const int64_t capacity = 2 * (world_ - 1) * peer_aligned(largest_);
  const auto bytes = c10::TensorOptions().dtype(c10::kByte).device(device_);
  auto memory = std::make_unique<PeerMemory>(signals_.driver(), rank_, world_, device_);
  std::string error;
  try {
    held_[0] = memory->allocate("the inbox of reductions", capacity, /*in_place=*/false, bytes);
    held_[1] = memory->allocate("the inbox's words", 1, /*in_place=*/false, bytes);
  } catch (const UserError&) {
    error = "no memory for " + std::to_string(capacity) + " bytes of an inbox for reductions";
  }
  try {
    throw_first(messages.errors(error));
  } catch (const TransportError& none) {
    throw UserError(std::string("[runtime] ") + none.what() +
                    ". Use more ranks, or compile.reduce \"nccl\", which needs none.");
  }
  memory->map(messages);
  inbox_ = memory->find(held_[0].const_data_ptr());
  freed_ = memory->find(held_[1].const_data_ptr());
  ring_.emplace(capacity);
  memory_ = std::move(memory);
  memory_->used_on(PeerSignals::handle(signals_.comm()));
}

int64_t PushReductions::room_for(int64_t piece_bytes) const {
  return (world_ - 1) * peer_aligned(piece_bytes);
}

void PushReductions::prepare(int64_t piece_bytes, Transport& base) {
  signals_.check();
  if (!memory_) make_inbox(base);
  const InboxRing::Place place = ring_->next(room_for(piece_bytes));
  while (!under_way_.empty() && under_way_.begin()->first <= place.after) {
    finish(under_way_.begin()->first);
  }
}

std::unique_ptr<Transfer> PushReductions::start(at::Tensor piece, at::Tensor full,
                                                std::shared_ptr<Span> span, Transport& base) {
  const auto bytes = static_cast<int64_t>(piece.nbytes());
  DC_CHECK(static_cast<int64_t>(full.nbytes()) == world_ * bytes, "pieces of another size");
  // What may find no memory comes before anything that peers count on.
  prepare(bytes, base);
  const int64_t room = room_for(bytes);
  const InboxRing::Place place = ring_->next(room);
  const uint64_t number = ++last_;
  ring_->take(place, room, number);
  UnderWay reduction{place.begin, bytes, std::move(piece), std::move(full)};
  // Order: what wrote the gradient (compute) -> pushes (comm).
  const std::optional<c10::Stream> comm = signals_.comm();
  if (comm) signals_.streams()->comm_follows_compute();
  if (place.after > settled_) {
    if (place.after > told_) {
      std::vector<MemoryOp> ops;
      tell_freed(&ops);
      signals_.driver()->run(std::move(ops), PeerSignals::handle(signals_.compute()));
    }
    signals_.watched_wait("a reduction's place in its peers' inboxes", *freed_,
                          static_cast<uint32_t>(place.after), comm);
    settled_ = place.after;
  }
  if (span) span->start(comm);
  push(number, reduction);
  if (span) span->stop(comm);
  under_way_.emplace(number, std::move(reduction));
  return std::make_unique<Push>(*this, number);
}

DeviceAddress PushReductions::slot(int64_t owner, int64_t source, const UnderWay& reduction) const {
  const int64_t index = source < owner ? source : source - 1;
  return inbox_->source(owner) +
         static_cast<DeviceAddress>(reduction.begin + index * peer_aligned(reduction.bytes));
}

void PushReductions::push(uint64_t number, const UnderWay& reduction) {
  const Driver::Stream stream = PeerSignals::handle(signals_.comm());
  const int64_t bytes = reduction.bytes;
  const auto from = reinterpret_cast<DeviceAddress>(reduction.full.const_data_ptr());
  for (int64_t d = 1; d < world_; ++d) {
    const int64_t owner = (rank_ + d) % world_;
    signals_.driver()->copy(slot(owner, rank_, reduction),
                            from + static_cast<DeviceAddress>(owner * bytes), bytes, stream,
                            copies_);
  }
  std::vector<MemoryOp> ops;
  signals_.tell(&ops, *inbox_, static_cast<uint32_t>(number));
  signals_.driver()->run(std::move(ops), stream);
}

void PushReductions::finish(uint64_t number) {
  const auto found = under_way_.find(number);
  if (found == under_way_.end()) return;
  signals_.check();
  const UnderWay& reduction = found->second;
  const std::optional<c10::Stream> compute = signals_.compute();
  const auto arrived = static_cast<uint32_t>(number);
  signals_.watched("the pieces of a reduction", *inbox_, arrived, compute, [&] {
    std::vector<MemoryOp> ops;
    tell_freed(&ops);
    signals_.await(&ops, *inbox_, arrived);
    signals_.driver()->run(std::move(ops), PeerSignals::handle(compute));
  });
  memory_->used_on(PeerSignals::handle(compute));
  if (reduction.piece.defined()) sum(reduction);
  under_way_.erase(found);
  summed_ = under_way_.empty() ? last_ : under_way_.begin()->first - 1;
}

void PushReductions::tell_freed(std::vector<MemoryOp>* ops) {
  if (summed_ <= told_) return;
  signals_.tell(ops, *freed_, static_cast<uint32_t>(summed_));
  told_ = summed_;
}

void PushReductions::drop(uint64_t number) {
  const auto found = under_way_.find(number);
  if (found == under_way_.end()) return;
  // Order: pushes (comm) -> reuse of the gradient's memory (compute).
  if (const StreamPair* const streams = signals_.streams()) {
    streams->mark(streams->comm())->block(streams->compute());
  }
  found->second.piece.reset();
  found->second.full.reset();
}

void PushReductions::sum(const UnderWay& reduction) {
  const at::Tensor& piece = reduction.piece;
  std::vector<at::Tensor> pieces;
  for (int64_t source = 0; source < world_; ++source) {
    if (source == rank_) {
      pieces.push_back(reduction.full.view({-1}).narrow(0, rank_ * piece.numel(), piece.numel()));
      continue;
    }
    pieces.push_back(at::from_blob(
        reinterpret_cast<void*>(slot(rank_, source, reduction)), {piece.numel()}, {1}, [](void*) {},
        piece.options(), device_));
  }
  piece_sum_(pieces, piece);
}

}  // namespace deepcompile
