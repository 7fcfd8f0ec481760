// SPDX-License-Identifier: Apache-2.0
#include "runtime/comm/copy_engine.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "base/error.h"
#include "runtime/comm/link_rounds.h"
#include "runtime/comm/peer_connect.h"
#include "runtime/comm/peer_memory.h"
#include "runtime/comm/peer_signals.h"
#include "runtime/comm/push_reductions.h"

namespace deepcompile {
namespace {

using std::chrono::milliseconds;
using Streams = std::shared_ptr<const StreamPair>;

constexpr const char* kCopyEngine = "copy_engine";
// Of a batch: with more transfers the first would wait for the host for longer than it takes,
// and with more bytes from or to each peer, who needs the first would wait for the last.
constexpr size_t kMostHeld = 16;
constexpr int64_t kMostHeldBytes = 128 << 20;

DeviceAddress address_of(const at::Tensor& tensor) {
  return reinterpret_cast<DeviceAddress>(tensor.const_data_ptr());
}

// What all transfers share.
struct Link {
  PeerSignals signals;
  LinkRounds rounds;

  Link(const CopyEngineOptions& options, std::shared_ptr<const Driver> driver, Transport& base,
       int64_t rank, int64_t world, c10::Device device, milliseconds timeout,
       const Streams& streams)
      : signals(std::move(driver), rank, world, timeout, streams),
        rounds(signals, base, rank, world, device, options.in_step_bytes) {}
};

class CopyEngineTransport final : public Transport {
 public:
  // pulls, pushes: whether gathers and reductions go by copy engine.
  CopyEngineTransport(const CopyEngineOptions& options, bool pulls, bool pushes,
                      std::unique_ptr<Transport> base, std::unique_ptr<Link> link, int64_t rank,
                      int64_t world, c10::Device device, const Streams& streams)
      : options_(options),
        pulls_(pulls),
        base_(std::move(base)),
        streams_(streams),
        rank_(rank),
        world_(world),
        link_(std::move(link)),
        signals_(link_->signals),
        rounds_(link_->rounds),
        memory_(signals_.driver(), rank, world, device) {
    memory_.used_on(PeerSignals::handle(signals_.comm()));
    if (!pushes) return;
    reductions_.emplace(signals_, rounds_, rank, world, device, options.least_bytes,
                        [this] { give_transfers(); });
    sums_allocate_ = PieceSum(device).allocates(world);
  }

  std::unique_ptr<Transfer> gather(at::Tensor full, at::Tensor shard,
                                   std::shared_ptr<Span> span) override;
  void before_write(const at::Tensor& shard) override {
    if (PeerShard* const place = memory_.find(shard.const_data_ptr())) await_readers(place);
  }
  at::Tensor shard_memory(const std::string& name, int64_t numel, bool in_place,
                          c10::TensorOptions options) override {
    const int64_t bytes = numel * static_cast<int64_t>(options.dtype().itemsize());
    if (!pulls_ || bytes < options_.least_bytes || numel == 0) return {};
    return memory_.allocate(name, numel, in_place, options);
  }
  at::Tensor sample_shard(int64_t bytes) override { return memory_.sample(bytes); }
  int64_t outside_bytes() const override {
    return memory_.bytes() + rounds_.outside_bytes() +
           (reductions_ ? reductions_->outside_bytes() : 0);
  }

  std::unique_ptr<Transfer> reduce_scatter(at::Tensor piece, at::Tensor full,
                                           std::shared_ptr<Span> span) override {
    const auto bytes = static_cast<int64_t>(piece.nbytes());
    if (!pushed(bytes)) {
      return base().reduce_scatter(std::move(piece), std::move(full), std::move(span));
    }
    const uint64_t number =
        reductions_->hold(std::move(piece), std::move(full), std::move(span), *base_);
    hold({nullptr, number}, bytes);
    return reductions_->transfer(number);
  }
  void prepare_reduction(int64_t piece_bytes) override {
    if (pushed(piece_bytes)) reductions_->prepare(piece_bytes, *base_);
  }
  void expect_reduction(int64_t piece_bytes) override {
    if (reductions_) reductions_->expect(piece_bytes);
  }
  std::unique_ptr<Transfer> start_all_reduce(at::Tensor tensor, Reduction reduction) override {
    return base().start_all_reduce(std::move(tensor), reduction);
  }
  void all_reduce(at::Tensor tensor, Reduction reduction) override {
    base().all_reduce(std::move(tensor), reduction);
  }
  void broadcast(at::Tensor tensor) override { base().broadcast(std::move(tensor)); }
  void barrier() override { base().barrier(); }
  void set_batch(Batch batch) override;
  void give() override {
    give_waits();
    give_transfers();
  }
  // On a device all share the base's stream, but for the sums of what is pushed.
  // On a CPU a gather is over when it has started, but what it should follow may not be.
  bool in_order(int64_t piece_bytes) const override {
    return !pushed(piece_bytes) && base_->in_order(piece_bytes);
  }

 private:
  class Pull;
  // A gather, from when it is asked for to when it was waited for.
  struct Gather {
    PeerShard* shard;
    at::Tensor full, piece;
    std::shared_ptr<Span> span;
    uint32_t ready;  // what its words are then
    bool given = false;
    std::unique_ptr<Transfer> on_stream = {};  // on a device, once it is given
  };
  struct Held {  // a transfer that is not given yet
    std::shared_ptr<Gather> gather;
    uint64_t reduction = 0;  // its number, if it is no gather
  };
  using Gathers = std::vector<std::shared_ptr<Gather>>;

  // For collectives: what is held comes before them on every rank.
  Transport& base() {
    give_transfers();
    return *base_;
  }
  bool pushed(int64_t piece_bytes) const { return reductions_ && reductions_->takes(piece_bytes); }
  void hold(Held transfer, int64_t bytes);
  void give_waits();
  void give_transfers();
  void pull(const Gathers& gathers);
  static DeviceCopy copy_of(const Gather& gather, int64_t owner);
  static int64_t piece_bytes(const Gather& gather) {
    return static_cast<int64_t>(gather.piece.nbytes());
  }
  void copy_from_peers(const Gather& gather, PeerSignals::Steps* next) const;
  Mark copy_own(const Gathers& gathers) const;
  void await_readers(PeerShard* shard);
  void await_readers(const std::vector<PeerShard*>& shards);

  const CopyEngineOptions options_;
  const bool pulls_;
  const std::unique_ptr<Transport> base_;
  const Streams streams_;  // null on a CPU
  const int64_t rank_;
  const int64_t world_;
  const std::unique_ptr<Link> link_;
  PeerSignals& signals_;
  LinkRounds& rounds_;
  PeerMemory memory_;
  std::optional<PushReductions> reductions_;
  bool sums_allocate_ = false;
  Batch batch_ = Batch::kNone;
  std::vector<Held> held_;
  int64_t held_bytes_ = 0;
  std::vector<PeerShard*> to_settle_;  // before compute writes to them
  uint64_t given_ = 0;                 // transfers so far, the same on every rank
  uint64_t over_ = 0;                  // those before this one are, on every rank, for compute
};

class CopyEngineTransport::Pull final : public Transfer {
 public:
  Pull(CopyEngineTransport& transport, std::shared_ptr<Gather> gather)
      : transport_(transport), gather_(std::move(gather)) {}
  ~Pull() override {
    try {
      if (!gather_->given) transport_.give_transfers();  // the peers count on it
    } catch (...) {  // the device is lost, or a peer; whoever uses it next reports that
    }
  }

  void wait() override {
    transport_.signals_.check();
    if (!gather_->given) transport_.give_transfers();
    if (gather_->on_stream) gather_->on_stream->wait();
    if (!gather_->shard->in_place) return;
    transport_.await_readers(gather_->shard);
    transport_.give_waits();  // it may not be put off
  }

 private:
  CopyEngineTransport& transport_;
  std::shared_ptr<Gather> gather_;
};

std::unique_ptr<Transfer> CopyEngineTransport::gather(at::Tensor full, at::Tensor shard,
                                                      std::shared_ptr<Span> span) {
  PeerShard* const place = memory_.find(shard.const_data_ptr());
  if (place == nullptr) return base().gather(std::move(full), std::move(shard), std::move(span));
  signals_.check();
  if (!memory_.mapped()) {
    RankMessages messages(base(), full.device(), world_);
    memory_.map(messages);
  }
  const auto bytes = static_cast<int64_t>(shard.nbytes());
  DC_CHECK(bytes <= place->bytes && static_cast<int64_t>(full.nbytes()) == world_ * bytes,
           "a gather of " + *place->name + " into a buffer of another size");
  ++place->round;
  auto gather = std::make_shared<Gather>(Gather{.shard = place,
                                                .full = std::move(full),
                                                .piece = std::move(shard),
                                                .span = std::move(span),
                                                .ready = 2 * place->round - 1});
  hold({gather}, bytes);
  return std::make_unique<Pull>(*this, std::move(gather));
}

void CopyEngineTransport::set_batch(Batch batch) {
  batch_ = batch;
  if (reductions_) reductions_->set_put_off(batch == Batch::kWaits && !sums_allocate_);
  give();
}

void CopyEngineTransport::hold(Held transfer, int64_t bytes) {
  held_.push_back(std::move(transfer));
  held_bytes_ += bytes;
  const bool many = held_.size() >= kMostHeld || held_bytes_ >= kMostHeldBytes;
  if (batch_ != Batch::kTransfers || many) give_transfers();
}

void CopyEngineTransport::give_waits() {
  if (const auto shards = std::exchange(to_settle_, {}); !shards.empty()) await_readers(shards);
  if (reductions_) over_ = std::max(over_, reductions_->sum_up());
}

// Runs of one kind go together.
void CopyEngineTransport::give_transfers() {
  const std::vector<Held> held = std::exchange(held_, {});
  held_bytes_ = 0;
  if (held.empty()) return;
  signals_.check();
  // Order: whatever wrote the shards and gradients, or last used the full buffers'
  // memory (compute) -> transfers (comm).
  if (streams_) streams_->comm_follows_compute();
  for (size_t i = 0; i < held.size();) {
    Gathers gathers;
    for (; i < held.size() && held[i].gather; ++i) gathers.push_back(held[i].gather);
    if (!gathers.empty()) pull(gathers);
    std::vector<uint64_t> reductions;
    for (; i < held.size() && !held[i].gather; ++i) reductions.push_back(held[i].reduction);
    if (reductions.empty()) continue;
    reductions_->push(reductions, given_ + 1);
    given_ += reductions.size();
  }
}

void CopyEngineTransport::pull(const Gathers& gathers) {
  const std::optional<c10::Stream> comm = signals_.comm();
  PeerSignals::Steps steps;
  for (const auto& gather : gathers) {
    signals_.tell(&steps, *gather->shard, gather->ready);
    gather->shard->given = ++given_;
    gather->given = true;
  }
  if (gathers.front()->span) gathers.front()->span->start(comm);
  Mark own = copy_own(gathers);
  const auto bytes_of = [&](size_t i) { return piece_bytes(*gathers[i]); };
  size_t ready = 0;  // the first that nothing waited for yet
  for (size_t i = 0; i < gathers.size(); ++i) {
    Gather& gather = *gathers[i];
    std::vector<PeerSignals::Await> awaits;
    if (i == ready) {
      ready = rounds_.end_of_wait(i, gathers.size(), bytes_of);
      for (size_t next = i; next < ready; ++next) {
        awaits.push_back({gathers[next]->shard, gathers[next]->ready});
        signals_.await(&steps, awaits.back());
      }
    }
    if (rounds_.has(bytes_of(i))) rounds_.begin(LinkRounds::Direction::kPull, &steps, &awaits);
    const auto copy = [&] {
      signals_.run(std::exchange(steps, {}), comm);
      if (gather.span && i > 0) gather.span->start(comm);
      copy_from_peers(gather, &steps);
      // Order: this rank's shards (beside) -> full buffers, and "I have read yours" (comm).
      if (const Mark copied = std::exchange(own, nullptr)) copied->block(*comm);
      if (gather.span) gather.span->stop(comm);
    };
    const Mark done = signals_.watched({"the gather of", true}, awaits, comm, copy);
    if (!streams_) continue;
    gather.on_stream = std::make_unique<StreamTransfer>(
        streams_, std::vector<at::Tensor>{gather.full, gather.piece}, done);
  }
  for (const auto& gather : gathers) signals_.tell(&steps, *gather->shard, gather->ready + 1);
  signals_.run(std::move(steps), comm);
  for (const auto& gather : gathers) {
    gather->full.reset();
    gather->piece.reset();
  }
}

DeviceCopy CopyEngineTransport::copy_of(const Gather& gather, int64_t owner) {
  const int64_t bytes = piece_bytes(gather);
  return {address_of(gather.full) + static_cast<DeviceAddress>(owner * bytes),
          gather.shard->source(owner), bytes};
}

void CopyEngineTransport::copy_from_peers(const Gather& gather, PeerSignals::Steps* next) const {
  std::vector<DeviceCopy> copies;
  for (int64_t d = 1; d < world_; ++d) copies.push_back(copy_of(gather, (rank_ + d) % world_));
  if (rounds_.has(piece_bytes(gather))) return rounds_.copy(copies, next);
  signals_.driver()->copy(copies, PeerSignals::handle(signals_.comm()));
}

// This rank's own shards, which need no link. What follows the copies; null if there were none,
// or on a CPU.
Mark CopyEngineTransport::copy_own(const Gathers& gathers) const {
  std::vector<DeviceCopy> copies;
  for (const auto& gather : gathers) {
    const DeviceCopy copy = copy_of(*gather, rank_);
    if (copy.to != copy.from) copies.push_back(copy);
  }
  if (copies.empty()) return nullptr;
  Driver::Stream stream = nullptr;
  if (streams_) {
    streams_->beside_follows_comm();
    stream = streams_->beside().native_handle();
  }
  signals_.driver()->copy(copies, stream);
  return streams_ ? streams_->mark(streams_->beside()) : nullptr;
}

void CopyEngineTransport::await_readers(PeerShard* shard) {
  const bool held = std::any_of(held_.begin(), held_.end(), [&](const Held& each) {
    return each.gather && each.gather->shard == shard;
  });
  if (held) give_transfers();
  if (shard->settled == shard->round) return;
  if (shard->given < over_) {
    shard->settled = shard->round;
  } else if (batch_ == Batch::kWaits) {
    to_settle_.push_back(shard);
  } else {
    await_readers(std::vector<PeerShard*>{shard});
  }
}

void CopyEngineTransport::await_readers(const std::vector<PeerShard*>& shards) {
  signals_.check();
  std::vector<PeerSignals::Await> awaits;
  for (PeerShard* const shard : shards) {
    awaits.push_back({shard, 2 * shard->round});
    shard->settled = shard->round;
  }
  signals_.watched_wait({"a write to", true}, awaits, signals_.compute());
}

bool is_word(const std::string& word) {
  return word == "nccl" || word == kCopyEngine || word == "auto";
}

// What goes by copy engine if peers can be reached, and else by `base` for `why_not`.
Route route(const std::string& setting, const char* key, const std::string& why_not) {
  if (setting == "nccl") return {"nccl", std::string(key) + " says so"};
  if (!why_not.empty()) return {"nccl", why_not};
  return {kCopyEngine, setting == kCopyEngine
                           ? std::string(key) + " says so"
                           : "all ranks are on one host and reach each other's memory"};
}

constexpr const char* kGatherKey = "compile.gather";
constexpr const char* kReduceKey = "compile.reduce";

}  // namespace

TransportChoice choose_transport(const CopyEngineOptions& options, std::unique_ptr<Transport> base,
                                 int64_t rank, int64_t world, c10::Device device,
                                 milliseconds timeout, std::shared_ptr<const StreamPair> streams) {
  for (const auto& [setting, what] :
       {std::pair(options.gather, "gathers"), std::pair(options.reduce, "reductions")}) {
    if (is_word(setting)) continue;
    throw UserError(std::string("[runtime] the transport of ") + what + " is \"" + setting +
                    "\". Use nccl, copy_engine or auto.");
  }
  if (options.signals != "auto" && options.signals != "writes" && options.signals != "copies") {
    throw UserError("[runtime] signals between ranks are \"" + options.signals +
                    "\". Use writes, copies or auto.");
  }
  const bool pulls = options.gather != "nccl", pushes = options.reduce != "nccl";
  const auto over_base = [&](const std::string& why_not) {
    return TransportChoice{std::move(base), route(options.gather, kGatherKey, why_not),
                           route(options.reduce, kReduceKey, why_not)};
  };
  if (world == 1) {
    return {std::move(base),
            {"nccl", "one rank has nothing to gather"},
            {"nccl", "one rank has nothing to reduce"}};
  }
  if (!pulls && !pushes) return over_base("");
  try {
    const auto driver = connect_peers(options, *base, rank, world, device, streams);
    auto link =
        std::make_unique<Link>(options, driver, *base, rank, world, device, timeout, streams);
    auto transport = std::make_unique<CopyEngineTransport>(
        options, pulls, pushes, std::move(base), std::move(link), rank, world, device, streams);
    TransportChoice choice{std::move(transport), route(options.gather, kGatherKey, ""),
                           route(options.reduce, kReduceKey, "")};
    for (Route* const route : {&choice.gathers, &choice.reductions}) {
      const bool copied = route->transport == kCopyEngine && driver->copies_words();
      if (copied) route->why += "; signals are copied";
    }
    return choice;
  } catch (const TransportError& error) {
    for (const auto& [setting, key] :
         {std::pair(options.gather, kGatherKey), std::pair(options.reduce, kReduceKey)}) {
      if (setting != kCopyEngine) continue;
      throw UserError(std::string("[runtime] ") + key +
                      " is \"copy_engine\", which is not possible here: " + error.what() +
                      ". Use \"nccl\", or \"auto\" to take it where it is possible.");
    }
    return over_base(error.what());
  }
}

}  // namespace deepcompile
