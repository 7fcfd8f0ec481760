// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/push_reductions.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace deepcompile {
namespace {

// Sums that are put off: as many as one launch takes, and of no more bytes than that
// the first need not wait long for the last one's pieces.
constexpr size_t kMostAsked = 24;
constexpr int64_t kMostAskedBytes = 64 << 20;

}  // namespace

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
  void wait_in_batch() override {
    if (!reductions_.put_off_) return wait();
    reductions_.ask(number_);
    int64_t bytes = 0;
    for (const auto& [number, reduction] : reductions_.asked_) bytes += reduction.bytes;
    const bool many = reductions_.asked_.size() >= kMostAsked || bytes >= kMostAskedBytes;
    if (many) reductions_.sum_up();
  }
  bool wait_adding(const RunningTotal& to) override {
    const bool will = reductions_.add_to(number_, to);
    will ? wait_in_batch() : wait();
    return will;
  }

 private:
  PushReductions& reductions_;
  uint64_t number_;
};

PushReductions::PushReductions(PeerSignals& signals, LinkRounds& rounds, int64_t rank,
                               int64_t world, c10::Device device, int64_t least_bytes,
                               std::function<void()> give)
    : signals_(signals),
      rounds_(rounds),
      rank_(rank),
      world_(world),
      device_(device),
      least_bytes_(least_bytes),
      give_(std::move(give)),
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
  give_();  // the host waits for the peers now, and they may for that
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
  const uint64_t after = ring_->next(room_for(piece_bytes)).after;
  if (!asked_.empty() && asked_.begin()->first <= after) sum_up();
  while (!under_way_.empty() && under_way_.begin()->first <= after) {
    finish(under_way_.begin()->first);
  }
}

uint64_t PushReductions::hold(at::Tensor piece, at::Tensor full, std::shared_ptr<Span> span,
                              Transport& base) {
  const auto bytes = static_cast<int64_t>(piece.nbytes());
  DC_CHECK(static_cast<int64_t>(full.nbytes()) == world_ * bytes, "pieces of another size");
  // What may find no memory comes before anything that peers count on.
  prepare(bytes, base);
  const int64_t room = room_for(bytes);
  const InboxRing::Place place = ring_->next(room);
  const uint64_t number = ++last_;
  ring_->take(place, room, number);
  under_way_.emplace(number, UnderWay{.begin = place.begin,
                                      .bytes = bytes,
                                      .after = place.after,
                                      .piece = std::move(piece),
                                      .full = std::move(full),
                                      .span = std::move(span)});
  return number;
}

std::unique_ptr<Transfer> PushReductions::transfer(uint64_t number) {
  return std::make_unique<Push>(*this, number);
}

void PushReductions::await_room(uint64_t after) {
  if (after > told_) {
    PeerSignals::Steps steps;
    tell_freed(&steps);
    signals_.run(std::move(steps), signals_.compute());
  }
  signals_.watched_wait({"a reduction's place in its peers' inboxes"},
                        {{freed_, static_cast<uint32_t>(after)}}, signals_.comm());
  settled_ = after;
}

DeviceAddress PushReductions::slot(int64_t owner, int64_t source, const UnderWay& reduction) const {
  const int64_t index = source < owner ? source : source - 1;
  return inbox_->source(owner) +
         static_cast<DeviceAddress>(reduction.begin + index * peer_aligned(reduction.bytes));
}

void PushReductions::push(const std::vector<uint64_t>& numbers, uint64_t given) {
  const std::optional<c10::Stream> comm = signals_.comm();
  PeerSignals::Steps steps;  // that come before the next wait
  size_t room = 0;           // up to here there is some
  for (size_t i = 0; i < numbers.size(); ++i) {
    UnderWay& reduction = under_way_.at(numbers[i]);
    if (i == room) {
      room = rounds_.end_of_wait(i, numbers.size(),
                                 [&](size_t at) { return under_way_.at(numbers[at]).bytes; });
      uint64_t after = 0;
      for (size_t next = i; next < room; ++next) {
        after = std::max(after, under_way_.at(numbers[next]).after);
      }
      if (after > settled_) {
        signals_.run(std::exchange(steps, {}), comm);
        await_room(after);
      }
    }
    push(reduction, &steps);
    reduction.given = given++;
    // Before anything is waited for, as a peer short of memory may want this one's sum first.
    if (i + 1 == room) signals_.tell(&steps, *inbox_, static_cast<uint32_t>(numbers[i]));
  }
  signals_.run(std::move(steps), comm);
  for (const uint64_t number : numbers) {
    if (const auto span = std::move(under_way_.at(number).span)) span->stop(comm);
  }
}

void PushReductions::push(UnderWay& reduction, PeerSignals::Steps* next) {
  const std::optional<c10::Stream> comm = signals_.comm();
  const int64_t bytes = reduction.bytes;
  const auto from = reinterpret_cast<DeviceAddress>(reduction.full.const_data_ptr());
  std::vector<DeviceCopy> copies;
  for (int64_t d = 1; d < world_; ++d) {
    const int64_t owner = (rank_ + d) % world_;
    copies.push_back(
        {slot(owner, rank_, reduction), from + static_cast<DeviceAddress>(owner * bytes), bytes});
  }
  if (reduction.span) reduction.span->start(comm);
  if (rounds_.has(bytes)) {
    std::vector<PeerSignals::Await> awaits;
    rounds_.begin(LinkRounds::Direction::kPush, next, &awaits);
    signals_.watched({"the reduction of", true}, awaits, comm, [&] {
      signals_.run(std::exchange(*next, {}), comm);
      rounds_.copy(copies, next);
    });
  } else {
    signals_.run(std::exchange(*next, {}), comm);
    signals_.driver()->copy(copies, PeerSignals::handle(comm));
  }
}

void PushReductions::ask(uint64_t number) {
  const auto found = under_way_.find(number);
  if (found == under_way_.end()) return;
  if (found->second.given == 0) give_();
  asked_.insert(under_way_.extract(found));
}

bool PushReductions::add_to(uint64_t number, const RunningTotal& to) {
  const auto found = under_way_.find(number);
  if (found == under_way_.end() || !piece_sum_.in_library(world_)) return false;
  found->second.total = to;
  return true;
}

void PushReductions::finish(uint64_t number) {
  while (!under_way_.empty() && under_way_.begin()->first < number) {
    ask(under_way_.begin()->first);
    sum_up();
  }
  ask(number);
  sum_up();
}

uint64_t PushReductions::sum_up() {
  if (asked_.empty()) return over_;
  signals_.check();
  const std::optional<c10::Stream> compute = signals_.compute();
  const auto arrived = static_cast<uint32_t>(asked_.rbegin()->first);
  signals_.watched({"the pieces of a reduction"}, {{inbox_, arrived}}, compute, [&] {
    PeerSignals::Steps steps;
    tell_freed(&steps);
    signals_.await(&steps, {inbox_, arrived});
    signals_.run(std::move(steps), compute);
  });
  memory_->used_on(PeerSignals::handle(compute));
  std::vector<PieceSum::Sum> sums;
  for (const auto& [number, reduction] : asked_) {
    const at::Tensor& piece = reduction.piece;
    if (!piece.defined()) continue;
    sums.push_back({pieces_of(reduction), piece.scalar_type(), piece, reduction.total});
  }
  piece_sum_(sums);
  over_ = std::max(over_, asked_.rbegin()->second.given);
  asked_.clear();
  summed_ = under_way_.empty() ? last_ : under_way_.begin()->first - 1;
  return over_;
}

void PushReductions::tell_freed(PeerSignals::Steps* steps) {
  if (summed_ <= told_) return;
  signals_.tell(steps, *freed_, static_cast<uint32_t>(summed_));
  told_ = summed_;
}

void PushReductions::drop(uint64_t number) {
  const auto found = under_way_.find(number);
  if (found == under_way_.end()) return;
  if (found->second.given == 0) give_();  // the peers count on it
  // Order: pushes (comm) -> reuse of the gradient's memory (compute).
  if (const StreamPair* const streams = signals_.streams()) {
    streams->compute_follows(streams->mark(streams->comm()));
  }
  found->second.piece.reset();
  found->second.full.reset();
}

std::vector<const void*> PushReductions::pieces_of(const UnderWay& reduction) const {
  std::vector<const void*> pieces;
  const auto* const mine = static_cast<const char*>(reduction.full.const_data_ptr());
  for (int64_t source = 0; source < world_; ++source) {
    pieces.push_back(source == rank_
                         ? static_cast<const void*>(mine + rank_ * reduction.bytes)
                         : reinterpret_cast<const void*>(slot(rank_, source, reduction)));
  }
  return pieces;
}

}  // namespace deepcompile
